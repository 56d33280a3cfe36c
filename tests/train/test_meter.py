"""What a step took of a device: memory, the share of its peak, power and energy; unavailable is None."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from train_cases import tiny

from llm_mlp.models import model_cost
from llm_mlp.train import meter
from llm_mlp.train.meter import Meter, peak_flops


def test_peaks_are_found_by_name():
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == peak_flops("NVIDIA H200", "fp16") == 989e12
    assert peak_flops("NVIDIA H100 PCIe", "bf16") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "fp32") == 156e12
    assert peak_flops("Somebody's accelerator", "bf16") is None


def test_a_step_on_a_gpu_is_measured_by_its_share(tmp_path, monkeypatch):
    """Of two readers each computes half of the tokens; forward, and twice that backward."""
    counter = SimpleNamespace(now=100.0)
    monkeypatch.setattr(meter, "Energy", lambda device: SimpleNamespace(joules=lambda: counter.now))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7)
    config = tiny(tmp_path, "precision=bf16")
    with Meter(config, torch.device("cuda"), readers=2) as m:
        counter.now += 50.0
        found = m.read(seconds=0.5, tokens=1000)
        assert m.joules() == 50.0
    flops = 3 * model_cost(config.model, context=config.data.seq_len).flops
    assert found == {
        "mfu": pytest.approx(500 * flops / 0.5 / 989e12),
        "memory_bytes": 7,
        "watts": 100.0,
        "joules_per_token": 0.1,
    }


def test_what_a_device_does_not_tell_is_unavailable(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(meter, "Energy", lambda device: SimpleNamespace(joules=lambda: None))
    with Meter(tiny(tmp_path), torch.device("cpu"), readers=1) as m:
        assert set(m.read(0.5, 1000).values()) == {None} and m.joules() is None
