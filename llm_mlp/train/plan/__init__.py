"""What a run needs before it is started: memory, exchanges, FLOPs, seconds, money and energy (docs/plan.md)."""

from llm_mlp.train.plan.figures import GPUS, PlanError
from llm_mlp.train.plan.layout import Job, Layout, Memory
from llm_mlp.train.plan.report import make_plan
from llm_mlp.train.plan.scale import scaled

__all__ = ["GPUS", "Job", "Layout", "Memory", "PlanError", "make_plan", "scaled"]
