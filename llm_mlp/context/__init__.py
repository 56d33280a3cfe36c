"""Contexts as files: a text that was read once is an object that can be saved, forked, shared and asked.

`Context` is the object, `Reader` makes and extends it with a model, `Store` keeps many of them in a folder.
"""

from llm_mlp.context.compose import compose, composing
from llm_mlp.context.context import Context, Reader, describe, diff
from llm_mlp.context.format import ContextError, Manifest, StorageError
from llm_mlp.context.recall import Recall, SourceRecall, ask, measure_composed, measure_recall, plant, plant_each
from llm_mlp.context.store import Found, Loaded, Store, default_folder
from llm_mlp.context.surprise import Surprise, measure_surprise, measuring

__all__ = [
    "Context",
    "ContextError",
    "Found",
    "Loaded",
    "Manifest",
    "Reader",
    "Recall",
    "SourceRecall",
    "StorageError",
    "Store",
    "Surprise",
    "ask",
    "compose",
    "composing",
    "default_folder",
    "describe",
    "diff",
    "measure_composed",
    "measure_recall",
    "measure_surprise",
    "measuring",
    "plant",
    "plant_each",
]
