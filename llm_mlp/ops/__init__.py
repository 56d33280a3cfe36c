"""Functions on tensors; imports torch (and, later, triton) only."""

from llm_mlp.ops.backend import debug_checks, set_debug_checks
from llm_mlp.ops.cross_entropy import linear_cross_entropy
from llm_mlp.ops.memorise import Units, memorise, memorise_step, units_init, units_select
from llm_mlp.ops.memorise.units import units_merge
from llm_mlp.ops.perceive import perceive, perceive_step, perceive_transition
from llm_mlp.ops.wide import first_layer, perceive_wide

__all__ = [
    "Units",
    "debug_checks",
    "first_layer",
    "linear_cross_entropy",
    "memorise",
    "memorise_step",
    "perceive",
    "perceive_step",
    "perceive_transition",
    "perceive_wide",
    "set_debug_checks",
    "units_init",
    "units_merge",
    "units_select",
]
