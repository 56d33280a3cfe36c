"""Tokens in, tokens out."""

from llm_mlp.infer.engine import Engine, Event, Full, Request, Ticket, slots_within, state_bytes
from llm_mlp.infer.generate import Start, generate
from llm_mlp.infer.prefill import read_tokens
from llm_mlp.infer.sampling import Sampling, sample

__all__ = [
    "Engine",
    "Event",
    "Full",
    "Request",
    "Sampling",
    "Start",
    "Ticket",
    "generate",
    "read_tokens",
    "sample",
    "slots_within",
    "state_bytes",
]
