"""LLM-MLP: language models without attention, made of perception heads."""

__version__ = "0.1.0"
