"""Training: one loop, optimizers, schedules, resumable state."""

from llm_mlp.train.loop import TrainingError, TrainResult, train

__all__ = ["TrainResult", "TrainingError", "train"]
