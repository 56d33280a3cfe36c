"""`head_inputs` and `head_outputs`: kernels against plain torch (the rule is in test_kernels.py)."""

from __future__ import annotations

import pytest
import torch
from op_cases import DEVICE, Earned, all_close, with_gradients

from llm_mlp.ops.heads import head_inputs, head_outputs

pytest.importorskip("triton", reason="the kernels are optional")
kernels = pytest.importorskip("llm_mlp.ops.heads.kernels")

# B, T, G, R, m, V, K, cu_seqlens, tail, what is switched off
CASES = {
    "plain": (2, 40, 2, 16, 2, 8, 4, None, False, ()),
    "long": (1, 90, 1, 16, 1, 16, 4, None, False, ()),
    "two-taps": (1, 35, 1, 32, 3, 16, 2, None, False, ()),
    "one-tap": (1, 9, 1, 16, 1, 16, 1, None, False, ()),
    "packed": (1, 75, 2, 16, 1, 16, 4, [0, 0, 1, 3, 40, 40, 75], False, ()),
    "packed-carried": (1, 75, 1, 16, 1, 16, 4, [0, 0, 1, 3, 40, 40, 75], True, ()),
    "carried": (3, 2, 1, 16, 2, 16, 4, None, True, ()),
    "bare": (2, 40, 2, 16, 2, 16, 0, None, False, ("slope", "write", "gain")),
    "no-units": (1, 40, 1, 16, 2, 16, 4, None, False, ("gain",)),
    "as-activated": (1, 40, 1, 16, 2, 16, 4, None, False, ()),
}


@pytest.fixture(autouse=True)
def short_runs(monkeypatch):
    """So that a backward pass has many runs."""
    monkeypatch.setitem(kernels.LAUNCH, "_inputs_back", {**kernels.LAUNCH["_inputs_back"], "RUN": 16})


def inputs_of(case, seed, dtype):
    """The tensors of a case by name, and what stays fixed."""
    B, T, G, R, m, V, K, cu, carried, off = CASES[case]
    C, N = 2 * G * R + G * m * V, B if cu is None else len(cu) - 1
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    tensors = {
        "x": normal(B, T, C).to(dtype),
        "conv": normal(C, K) / 2 if K else None,
        "slope": 1 + normal(C) / 4,
        "write": normal(B, T, G * m * V).to(dtype),
        "gain": 1 + normal(2, R) / 4,
        "tail": normal(N, max(K - 1, 0), C).to(dtype) if carried else None,
    }
    for name in ("conv", "slope", "gain"):
        if tensors[name] is not None:
            tensors[name] = tensors[name].float()
    tensors.update(dict.fromkeys(off))
    fixed = {"groups": G, "heads": (m, V), "eps": 1e-6, "normalize": case != "as-activated"}
    return tensors, fixed | {"cu_seqlens": None if cu is None else torch.tensor(cu)}


def run_inputs(tensors, fixed, backend):
    """A function of the tensors that there are."""
    names = [name for name, x in tensors.items() if x is not None]

    def run(*given):
        found = dict.fromkeys(tensors) | dict(zip(names, given, strict=True))
        # A slice of a wider tensor, as the model gives it.
        wide = torch.cat([found["x"], found["x"].detach()[..., :5]], -1)
        out, tail = head_inputs(wide[..., : found["x"].shape[-1]], *list(found.values())[1:], backend=backend, **fixed)
        return [x for x in (*out, tail) if x is not None]

    return run, [tensors[name] for name in names]


def earn(case, dtype, seeds):
    earned = None
    for seed in range(seeds):
        tensors, fixed = inputs_of(case, seed, dtype)
        of = {b: run_inputs(tensors, fixed, b)[0] for b in ("chunked", "triton")}
        given = run_inputs(tensors, fixed, "chunked")[1]
        if earned is None:
            outputs = "q k w" + (" units_q units_k" if tensors["gain"] is not None else "")
            outputs += " tail" if tensors["conv"] is not None else ""
            there = [f"d{name}" for name, x in tensors.items() if x is not None]
            earned = Earned(f"{outputs} {' '.join(there)}")
        earned.add(lambda backend, of=of: of["triton" if backend == "triton" else "chunked"], given)
    earned.check()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inputs(case, dtype, poisoned):
    earn(case, dtype, seeds=1)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_inputs_over_seeds(case, dtype, poisoned):
    earn(case, dtype, seeds=8 if DEVICE == "cpu" else 32)


@pytest.mark.parametrize("read", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs(read, gated, dtype, poisoned):
    earned = Earned("out dy" + (" dread dshare" if read else "") + (" dgate" if gated else ""))
    for seed in range(8):
        g = torch.Generator().manual_seed(seed)
        shape = (2, 13, 3, 2, 32)
        left, r, gate = (torch.randn(shape, generator=g).to(dtype) for _ in range(3))
        share = torch.randn(shape[:-1], generator=g).to(dtype)
        given = [left, *([r, share] if read else []), *([gate.flatten(-3)] if gated else [])]

        def of(backend):
            backend = "triton" if backend == "triton" else "chunked"

            def run(y, *rest):
                rest = list(rest)
                r, share = (rest.pop(0), rest.pop(0)) if read else (None, None)
                return [head_outputs(y, r, share, rest.pop(0) if gated else None, eps=1e-6, backend=backend)]

            return run

        earned.add(of, given)
    earned.check()


def test_bad_shapes_are_named():
    tensors, fixed = inputs_of("plain", 0, torch.float32)
    with pytest.raises(ValueError, match="95 channels, which are not q and k of 2 groups"):
        head_inputs(tensors["x"][..., :-1], None, None, None, None, **fixed)
    with pytest.raises(ValueError, match=r"head_inputs: write has shape"):
        head_inputs(tensors["x"], None, None, tensors["write"][..., 1:], None, **fixed)
    with pytest.raises(ValueError, match=r"does not serve 5 taps"):
        head_inputs(tensors["x"].to(DEVICE), torch.zeros(96, 5), None, None, None, **fixed, backend="triton")
    y = torch.zeros(1, 3, 1, 2, 8)
    with pytest.raises(ValueError, match=r"head_outputs: gate has shape"):
        head_outputs(y, None, None, torch.zeros(1, 3, 8), eps=1e-6)


def test_compiled_whole_and_bit_equal():
    tensors, fixed = inputs_of("carried", 0, torch.bfloat16)
    run, given = run_inputs(tensors, fixed, "triton")
    given = [x.to(DEVICE) for x in given]
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for first, second in zip(with_gradients(compiled, given), with_gradients(run, given), strict=True):
        all_close(first, second, 0.0)
