"""Tokens in, tokens out."""

from llm_mlp.infer.generate import generate
from llm_mlp.infer.sampling import Sampling, sample

__all__ = ["Sampling", "generate", "sample"]
