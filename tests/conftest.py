"""What every test shares: one thread, the folders of the helper modules, poisoned buffers."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

# Before torch is imported, and for the processes that tests start too: threads that spin while they wait for each other
# slow a run down many times where other tests have the cores.
os.environ["OMP_NUM_THREADS"] = "1"

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run on the CPU; read when anything first imports triton
for folder in ("ops", "models", "train", "serve"):
    path = str(Path(__file__).parent / folder)
    if path not in sys.path:
        sys.path.insert(0, path)


@pytest.fixture
def poisoned():
    """Uninitialised memory is NaN (integers: the largest), so that an element nobody wrote is noticed."""
    before = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)
    torch.utils.deterministic.fill_uninitialized_memory = filled
