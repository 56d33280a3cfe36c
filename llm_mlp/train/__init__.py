"""Training: one loop, optimizers, schedules, controllers, processes, resumable state."""

from llm_mlp.train.gradients import TrainingError
from llm_mlp.train.loop import TrainResult, train
from llm_mlp.train.parallel import RankError

__all__ = ["RankError", "TrainResult", "TrainingError", "train"]
