"""Models: modules only; no optimizer, mesh or file code."""

from llm_mlp.models.lm import LM, MIXERS, Block, Output, build_model, model_cost

__all__ = ["LM", "MIXERS", "Block", "Output", "build_model", "model_cost"]
