"""Joules of processors and GPUs, by counters that are files and a library of our own."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from llm_mlp import energy
from llm_mlp.energy import Energy, Shares, Spent

CPU = torch.device("cpu")


class Counter:
    """Joules as a test sets them; None: unavailable."""

    def __init__(self, joules: float | None = 0.0) -> None:
        self.now = joules

    def joules(self) -> float | None:
        return self.now

    def watts(self) -> float | None:
        return None if self.now is None else 12.5


@pytest.fixture
def clock(monkeypatch):
    """Seconds, as a test sets them."""
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(energy.time, "perf_counter", lambda: now.seconds)
    return now


@pytest.fixture
def zones(tmp_path, monkeypatch):
    """Two packages, a part of one, and what has both in it."""
    monkeypatch.setattr(energy, "RAPL", tmp_path)
    found = {}
    for zone, name in (
        ("intel-rapl:0", "package-0"),
        ("intel-rapl:0:0", "core"),
        ("intel-rapl:1", "package-1"),
        ("intel-rapl:2", "psys"),
    ):
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "name").write_text(f"{name}\n")
        (tmp_path / zone / "max_energy_range_uj").write_text("100000000\n")
        found[name] = tmp_path / zone / "energy_uj"
        found[name].write_text("90000000\n")
    return found


def test_packages_are_added_and_go_round(zones, clock):
    meter = Energy(CPU)
    assert meter.joules() == 0 and meter.watts() is None  # no time has passed
    for name, value in (("package-0", 95_000_000), ("package-1", 2_000_000), ("core", 99_000_000), ("psys", 0)):
        zones[name].write_text(f"{value}\n")
    assert meter.joules() == 0  # read just now
    clock.seconds += 4
    assert meter.joules() == 5 + 12
    assert meter.watts() == 17 / 4
    clock.seconds += 0.5
    assert meter.watts() == 17 / 4  # too soon for another mean
    zones["package-1"].write_text("5000000\n")
    clock.seconds += 0.5
    assert meter.watts() == 3


def test_what_cannot_be_read_is_unavailable(zones, clock, tmp_path, monkeypatch, caplog):
    meter = Energy(CPU)
    clock.seconds += 2
    zones["package-0"].unlink()
    assert meter.joules() is None and meter.watts() is None and meter.joules() is None
    assert [r.message for r in caplog.records if "unavailable from here on" in r.message] == [caplog.records[0].message]
    monkeypatch.setattr(energy, "RAPL", tmp_path / "none")
    assert Energy(CPU).joules() is None and Energy(CPU).watts() is None
    with Spent(Energy(CPU)) as spent:
        pass
    assert spent.joules is None and spent.watts is None


def test_a_gpus_counter_is_in_millijoules(monkeypatch, clock):
    counter = SimpleNamespace(millijoules=7_000_000)
    library = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: {"GPU-abc": "handle"}[uuid],
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: {"handle": counter.millijoules}[handle],
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abc"))
    meter = Energy(torch.device("cuda"))
    with Spent(meter) as spent:
        counter.millijoules += 1500
        clock.seconds += 0.5
    assert spent.joules == 1.5 and spent.watts == 3.0
    library.nvmlDeviceGetTotalEnergyConsumption = lambda handle: 1 / 0  # as for a card that has none
    assert Energy(torch.device("cuda")).joules() is None


def test_shares_of_those_who_come_and_go():
    counter = Counter(50.0)  # before anybody came
    shares = Shares(counter)
    counter.now += 7  # nobody's
    first = shares.mark(0)
    counter.now += 4  # of one
    second = shares.mark(1)
    counter.now += 6  # of two
    end = shares.mark(2)
    assert end - first == 4 + 3 and end - second == 3
    counter.now = None
    assert shares.mark(1) is None
