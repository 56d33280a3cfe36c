"""What the ops refuse, and how they say it; the dispatcher; the debug switch."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_cases import carried_units, memorise_inputs, perceive_inputs, perceive_state
from torch import Tensor

from llm_mlp.ops import (
    backend,
    debug_checks,
    memorise,
    memorise_step,
    perceive,
    perceive_step,
    perceive_transition,
    set_debug_checks,
    units_init,
    units_select,
)

B, T, G, F, m, V, R = 2, 9, 2, 4, 3, 2, 4
SIZE = {"block": 4, "slots": 3}


def perceive_arguments(batch: int = B) -> dict[str, Any]:
    return dict(zip(("q", "k", "e", "w", "log_decay"), perceive_inputs(batch, T, G, F, m, V), strict=True))


def memorise_arguments(batch: int = B) -> dict[str, Any]:
    names = ("q", "k", "w", "score", "sink")
    return {**dict(zip(names, memorise_inputs(batch, T, G, R, m, V), strict=True)), **SIZE}


def select_arguments(batch: int = B) -> dict[str, Any]:
    return {name: x for name, x in memorise_arguments(batch).items() if name not in ("q", "sink")}


def transition_arguments(batch: int = B) -> dict[str, Any]:
    return {name: x for name, x in perceive_arguments(batch).items() if name in ("k", "e", "log_decay")}


def perceive_step_arguments() -> dict[str, Any]:
    token = {name: x[:, 0] for name, x in perceive_arguments().items()}
    return {**token, "states": perceive_state(B, G, F, m, V)}


def memorise_step_arguments() -> dict[str, Any]:
    a = memorise_arguments()
    token = {name: x[:, 0] if name in ("q", "k", "w", "score") else x for name, x in a.items()}
    return {**token, "units": units_init(B, G, R, m, V, **SIZE, dtype=torch.float64)}


OPS: dict[str, tuple[Callable, Callable[..., dict[str, Any]]]] = {
    "perceive": (perceive, perceive_arguments),
    "perceive_transition": (perceive_transition, transition_arguments),
    "perceive_step": (perceive_step, perceive_step_arguments),
    "memorise": (memorise, memorise_arguments),
    "units_select": (units_select, select_arguments),
    "memorise_step": (memorise_step, memorise_step_arguments),
}
TENSORS = [
    (op, name) for op, (_, make) in OPS.items() for name, value in make().items() if isinstance(value, torch.Tensor)
]


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_shapes_are_checked(op, name):
    """Every tensor argument, a dimension short or with a group too many: the message names the op."""
    run, make = OPS[op]
    groups = 0 if name == "sink" else 1 if op.endswith("_step") else 2
    for change in (lambda x: x[0], lambda x: torch.cat([x, x.narrow(groups, 0, 1)], groups)):
        arguments = make()
        arguments[name] = change(arguments[name])
        with pytest.raises(ValueError, match=rf"^{op}: .*(has shape|must be|expected float tensors)"):
            run(**arguments)


@pytest.mark.parametrize("op", ["perceive", "perceive_transition", "memorise", "units_select"])
def test_dtypes_are_checked(op):
    run, make = OPS[op]
    arguments = make()
    arguments["k"] = arguments["k"].float()
    with pytest.raises(ValueError, match=rf"^{op}: .*must have one dtype; got .*torch.float32"):
        run(**arguments)
    arguments = {name: x.long() if isinstance(x, Tensor) else x for name, x in make().items()}
    with pytest.raises(ValueError, match=rf"^{op}: "):
        run(**arguments)


def test_the_message_says_which_and_what():
    arguments = perceive_arguments()
    with pytest.raises(ValueError, match=r"perceive: e has shape \(2, 9, 2, 3\), expected \(2, 9, 2, 4\)"):
        perceive(**{**arguments, "e": arguments["e"][..., :3]})
    with pytest.raises(ValueError, match=r"perceive: log_decay has shape \(2, 9, 2, 2\), expected \(2, 9, 2, 3\)"):
        perceive(**{**arguments, "log_decay": arguments["log_decay"][..., :2]})
    with pytest.raises(ValueError, match=r"perceive: state has shape .*, expected \(2, 2, 4, 3, 2\)"):
        perceive(**arguments, state=perceive_state(3, G, F, m, V))
    with pytest.raises(ValueError, match=r"perceive: state has shape .*, expected \(3, 2, 4, 3, 2\)"):
        perceive(**perceive_arguments(1), state=perceive_state(1, G, F, m, V), cu_seqlens=torch.tensor([0, 2, 5, T]))
    with pytest.raises(ValueError, match=r"memorise: sink has shape \(1,\), expected \(2,\)"):
        memorise(**{**memorise_arguments(), "sink": torch.zeros(1)})
    for units in (carried_units([3], G, R, m, V, **SIZE), carried_units([3, 1], G, R, m, V, block=4, slots=2)):
        with pytest.raises(ValueError, match=r"memorise: units.keys has shape .*block = 4, slots = 3"):
            memorise(**memorise_arguments(), units=units)
    units = carried_units([3, 1], G, R, m, V, **SIZE)
    with pytest.raises(ValueError, match=r"memorise: units.length has shape \(1,\), expected \(2,\)"):
        memorise(**memorise_arguments(), units=units._replace(length=units.length[:1]))
    with pytest.raises(ValueError, match=r"memorise: units.values has shape"):
        memorise(**memorise_arguments(), units=units._replace(values=units.values[..., :1]))


@pytest.mark.parametrize("op", ["perceive", "memorise", "units_select"])
@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        (torch.tensor([0, 5, 4, T]), "cu_seqlens decreases at 2: 5 then 4"),
        (torch.tensor([0, 5, T - 1]), f"must go from 0 to T = {T}, got 0 to {T - 1}"),
        (torch.tensor([0, 5, T + 1]), f"must go from 0 to T = {T}, got 0 to {T + 1}"),
        (torch.tensor([1, 5, T]), f"must go from 0 to T = {T}, got 1 to {T}"),
        (torch.tensor([0.0, 5.0, T]), "vector of N.1 int32 or int64"),
        (torch.tensor([[0, T]]), r"vector of N.1 int32 or int64, got \(1, 2\)"),
        (torch.zeros(0, dtype=torch.long), "vector of N.1 int32 or int64"),
        (torch.tensor([0, 5, T], device="meta"), "must be on the CPU .* it is on meta"),
    ],
)
def test_cu_seqlens_are_checked(op, cu_seqlens, message):
    run, make = OPS[op]
    with pytest.raises(ValueError, match=f"^{op}: .*{message}"):
        run(**make(1), cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("op", ["perceive", "memorise", "units_select"])
def test_packed_batches_have_one_row(op):
    run, make = OPS[op]
    with pytest.raises(ValueError, match=rf"^{op}: with cu_seqlens the batch must be 1 .*got B = 2"):
        run(**make(), cu_seqlens=torch.tensor([0, T]))


def test_cuda_cu_seqlens_raise_without_a_gpu():
    """The check looks at the device alone, so a stand-in shows it."""

    class OnCuda:
        device = torch.device("cuda", 0)
        dtype, ndim = torch.int64, 1

        def numel(self) -> int:
            return 2

        def tolist(self) -> list[int]:
            raise AssertionError("reading it would wait for the GPU")

    with pytest.raises(ValueError, match="cu_seqlens must be on the CPU .* it is on cuda:0"):
        backend.sequence_bounds(OnCuda(), 1, T, "perceive")  # type: ignore[arg-type]


@pytest.mark.parametrize("op", ["perceive", "memorise"])
def test_backends(op, caplog):
    run, make = OPS[op]
    with pytest.raises(ValueError, match=rf"^{op}: unknown backend 'cuda'; known: auto, reference, chunked, triton"):
        run(**make(), backend="cuda")
    with pytest.raises(ValueError, match=rf"^{op}: backend 'triton' cannot run: .*; use 'auto' or 'chunked'"):
        run(**make(), backend="triton")
    backend._logged.clear()
    with caplog.at_level(logging.INFO, logger="llm_mlp.ops"):
        for _ in range(3):
            run(**make())
        run(**make(), backend="reference")
    assert [r.message for r in caplog.records] == [f"{op}: backend chunked (the fast path on cpu)"]


def test_an_explicit_backend_is_the_one_that_runs(monkeypatch):
    from llm_mlp.ops.memorise import chunked as memorise_chunked
    from llm_mlp.ops.memorise import reference as memorise_reference
    from llm_mlp.ops.perceive import chunked, reference

    def refuse(*_: Any, **__: Any):
        raise AssertionError("the other backend ran")

    with monkeypatch.context() as patch:
        patch.setattr(reference, "perceive", refuse)
        patch.setattr(memorise_reference, "memorise", refuse)
        perceive(**perceive_arguments(), backend="chunked")
        memorise(**memorise_arguments(), backend="chunked")
    monkeypatch.setattr(chunked, "perceive", refuse)
    monkeypatch.setattr(memorise_chunked, "memorise", refuse)
    perceive(**perceive_arguments(), backend="reference")
    memorise(**memorise_arguments(), backend="reference")


def test_sizes_and_activation_are_checked():
    for run, make in (OPS["memorise"], OPS["units_select"], OPS["memorise_step"]):
        with pytest.raises(ValueError, match="block = 0 requires slots = 0"):
            run(**{**make(), "block": 0, "slots": 1})
        with pytest.raises(ValueError, match="must not be negative"):
            run(**{**make(), "block": 4, "slots": -1})
    with pytest.raises(ValueError, match="units_init: block = 0 requires slots = 0"):
        units_init(1, G, R, m, V, block=0)
    for run, make in (OPS["memorise"], OPS["memorise_step"]):
        with pytest.raises(ValueError, match="unknown activation 'gelu'; known: relu2, softmax"):
            run(**make(), activation="gelu")


# -- values, under the debug switch ------------------------------------------------------------------------------

FLOATS = [(op, name) for op, name in TENSORS if name not in ("log_decay", "score")]


def spoiled(op: str, name: str, value: float) -> dict[str, Any]:
    arguments = OPS[op][1]()
    arguments[name] = arguments[name].contiguous().clone()
    arguments[name].view(-1)[1] = value
    return arguments


@pytest.mark.parametrize(("op", "name"), FLOATS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_bad_numbers(op, name, value):
    with debug_checks(), pytest.raises(ValueError, match=rf"^{op}: {name} has NaN or infinite values"):
        OPS[op][0](**spoiled(op, name, value))
    OPS[op][0](**spoiled(op, name, value))  # without the switch nobody looks


@pytest.mark.parametrize("op", ["perceive", "perceive_transition", "perceive_step"])
@pytest.mark.parametrize("value", [1e-3, torch.nan, torch.inf])
def test_positive_decays(op, value):
    with debug_checks(), pytest.raises(ValueError, match=rf"^{op}: log_decay must be <= 0 and not NaN"):
        OPS[op][0](**spoiled(op, "log_decay", value))
    OPS[op][0](**spoiled(op, "log_decay", value))


@pytest.mark.parametrize("op", ["memorise", "units_select", "memorise_step"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_bad_scores(op, value):
    with debug_checks(), pytest.raises(ValueError, match=rf"^{op}: score must be finite or -inf"):
        OPS[op][0](**spoiled(op, "score", value))
    OPS[op][0](**spoiled(op, "score", value))


@pytest.mark.parametrize("op", ["perceive", "memorise", "memorise_step", "units_select"])
def test_bad_carried_numbers(op):
    run, make = OPS[op]
    with debug_checks():
        if op == "perceive":
            state = perceive_state(B, G, F, m, V)
            state[0, 0, 0] = torch.nan
            with pytest.raises(ValueError, match="perceive: state has NaN"):
                run(**make(), state=state)
            return
        for field in ("keys", "values"):
            units = carried_units([3, 5], G, R, m, V, **SIZE)
            getattr(units, field)[0] = torch.nan
            with pytest.raises(ValueError, match=rf"{op}: units.{field} has NaN"):
                run(**{**make(), "units": units})


def test_good_numbers_pass_the_checks():
    with debug_checks():
        for run, make in OPS.values():
            arguments = make()
            for name in ("log_decay", "score"):
                if name in arguments:
                    arguments[name][0, 0] = -torch.inf
            run(**arguments)
        perceive(**perceive_arguments(), state=perceive_state(B, G, F, m, V))
        memorise(**memorise_arguments(), units=carried_units([3, 5], G, R, m, V, **SIZE))
        for op in ("perceive", "memorise"):  # and no tokens at all
            run, make = OPS[op]
            run(**{name: x[:, :0] if isinstance(x, Tensor) and x.ndim > 1 else x for name, x in make().items()})


def test_the_switch():
    bad = spoiled("perceive", "q", torch.nan)
    set_debug_checks(True)
    try:
        with pytest.raises(ValueError, match="q has NaN"):
            perceive(**bad)
        with debug_checks(False):
            perceive(**bad)
        with pytest.raises(ValueError, match="q has NaN"):
            perceive(**bad)
    finally:
        set_debug_checks(False)
    perceive(**bad)
    with pytest.raises(RuntimeError, match="inside"), debug_checks():
        raise RuntimeError("inside")
    perceive(**bad)  # the block restores the switch after an error too
