"""Tokens in, tokens out."""

from llm_mlp.infer.constraint import Constraint, ConstraintError, Grammars
from llm_mlp.infer.engine import Engine, Event, Full, Request, Stopped, Ticket, slots_within, state_bytes
from llm_mlp.infer.generate import Start, generate
from llm_mlp.infer.prefill import read_tokens
from llm_mlp.infer.sampling import Sampling, sample

__all__ = [
    "Constraint",
    "ConstraintError",
    "Engine",
    "Event",
    "Full",
    "Grammars",
    "Request",
    "Sampling",
    "Start",
    "Stopped",
    "Ticket",
    "generate",
    "read_tokens",
    "sample",
    "slots_within",
    "state_bytes",
]
