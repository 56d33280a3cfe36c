"""Tokens in, tokens out."""

from llm_mlp.infer.generate import Start, generate
from llm_mlp.infer.prefill import read_tokens
from llm_mlp.infer.sampling import Sampling, sample

__all__ = ["Sampling", "Start", "generate", "read_tokens", "sample"]
