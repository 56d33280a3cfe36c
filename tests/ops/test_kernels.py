"""The Triton kernels: on a CUDA device where there is one, else on the CPU in Triton's interpreter.

The rule (docs/extending.md): truth is the float64 reference on the rounded inputs; a tensor's root mean square and
largest error are at most twice those of `chunked` in the same dtype, or 2 eps of its dtype times the truth's root mean
square where that is larger. Errors are pooled over several seeds, outputs are poisoned with NaN first.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from op_cases import DEVICE, Earned, Run, memorise_inputs, perceive_inputs, perceive_state, with_gradients
from torch.utils.checkpoint import checkpoint

from llm_mlp.ops import memorise, perceive, perceive_transition

pytest.importorskip("triton", reason="the kernels are optional")


# -- perceive ------------------------------------------------------------------------------------------------------

# B, T, G, F, m, V, cu_seqlens
SHAPES = {
    "plain": (2, 130, 1, 32, 2, 16, None),
    "one-token": (1, 1, 2, 16, 1, 16, None),
    "chunk": (1, 64, 2, 16, 3, 16, None),
    "narrow-values": (1, 70, 2, 16, 3, 4, None),
    "packed": (1, 150, 2, 16, 2, 16, [0, 0, 3, 70, 70, 150]),
    "features": (1, 100, 1, 128, 1, 32, None),
}


def run_perceive(cu: list[int] | None) -> Callable[[str], Run]:
    bounds = None if cu is None else torch.tensor(cu)

    def of(backend: str) -> Run:
        return lambda *x: perceive(*x, cu_seqlens=bounds, return_residual=True, backend=backend)

    return of


def earn_perceive(shape: str, decay: str, dtype: torch.dtype, seeds: int, scalar: bool = False) -> None:
    B, T, G, F, m, V, cu = SHAPES[shape]
    N = B if cu is None else len(cu) - 1
    earned = Earned("y state residual dq dk de dw dlog_decay dstate")
    for seed in range(seeds):
        inputs = perceive_inputs(B, T, G, F, m, V, decay=decay, dtype=dtype, seed=seed, scalar=scalar)
        inputs[4] = inputs[4].float()
        earned.add(run_perceive(cu), [*inputs, perceive_state(N, G, F, m, V, seed=seed, dtype=torch.float32)])
    earned.check()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_perceive(shape, dtype, poisoned):
    earn_perceive(shape, "mild", dtype, seeds=8 if shape == "one-token" else 2)


@pytest.mark.parametrize("decay", ["mild", "mixed"])
@pytest.mark.parametrize("shape", ["packed", "features"])
def test_perceive_with_one_erase_a_group(shape, decay, poisoned):
    earn_perceive(shape, decay, torch.bfloat16, seeds=2, scalar=True)


@pytest.mark.parametrize("decay", ["none", "resets", "twenty", "thousand", "mixed"])
def test_perceive_decays(decay, poisoned):
    earn_perceive("plain", decay, torch.float32, seeds=2)


@pytest.mark.parametrize("scalar", [True, False], ids=["scalar", "vector"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_transition(dtype, scalar):
    def run(k, e, decay, backend):
        with torch.no_grad():
            return perceive_transition(k, e, decay, backend=backend)

    _, k, e, _, decay = perceive_inputs(2, 200, 2, 32, 2, 16, dtype=dtype, scalar=scalar)
    truth = run(k.double(), e.double(), decay.double(), "chunked")[0]
    yard, got = (run(*(x.to(DEVICE) for x in (k, e, decay)), backend)[0] for backend in ("chunked", "triton"))
    mine, other = ((x.double().cpu() - truth).square().mean().sqrt() for x in (got, yard))
    # 16-bit inputs: `chunked` multiplies float32, as TF32 on a device; a CPU has no such rounding to compare with.
    eps = torch.finfo(got.dtype).eps if dtype == torch.float32 else 2**-12
    assert mine <= max(2.5 * other, 2 * eps * truth.square().mean().sqrt())


def test_a_transition_with_gradients_is_not_served():
    _, k, e, _, decay = (x.to(DEVICE) for x in perceive_inputs(1, 4, 1, 16, 1, 16, dtype=torch.float32))
    with pytest.raises(ValueError, match="does not serve gradients of a transition"):
        perceive_transition(k.requires_grad_(), e, decay, backend="triton")


@pytest.fixture
def short_spans(monkeypatch):
    """Sequences of four chunks and more are cut into spans of one."""
    from llm_mlp.ops.perceive import kernels

    monkeypatch.setattr(kernels, "SPAN", 64)
    monkeypatch.setattr(kernels, "FULL", 1000)
    assert kernels.spans_of([0, 0, 260, 270], 1) == [0, 64, 128, 192, 256, 260, 270]


@pytest.mark.parametrize("decay", ["mild", "mixed"])
@pytest.mark.parametrize("cu", [None, [0, 0, 3, 281, 281, 300]], ids=["whole", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_perceive_in_spans(dtype, cu, decay, poisoned, short_spans):
    SHAPES["spans"] = (2 if cu is None else 1, 300, 1, 32, 2, 16, cu)
    earn_perceive("spans", decay, dtype, seeds=1, scalar=cu is None)


def test_what_is_cut_into_spans():
    from llm_mlp.ops.perceive.kernels import FULL, SPAN, spans_of

    many = list(range(0, 64 * 2048 + 1, 2048))
    assert spans_of(many, 16) == many  # enough sequences as it is
    cut = spans_of([0, 131_072], 16)
    assert len(cut) - 1 == FULL // 16 and all((b - a) % 64 == 0 for a, b in zip(cut[:-2], cut[1:], strict=False))
    assert spans_of([0, 4 * SPAN - 1], 16) == [0, 4 * SPAN - 1]  # too short to gain


# One erase a group in float32: the largest error of `dstate` is 2.6 times the yardstick in the interpreter, without
# fused multiply-add; `auto` takes no kernels for float32; the default tests have a vector's erase there.
KINDS = [(torch.float32, False), *((d, s) for d in (torch.bfloat16, torch.float16) for s in (True, False))]


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "scalar"), KINDS, ids=[f"{d}-{'scalar' if s else 'vector'}" for d, s in KINDS])
@pytest.mark.parametrize("shape", SHAPES)
def test_perceive_over_seeds(shape, dtype, scalar, poisoned):
    """So many seeds that every tensor has over 1,000 numbers, the small ones from 32."""
    seeds = {"plain": 8, "features": 12, "packed": 12}.get(shape, 32)
    earn_perceive(shape, "mixed", dtype, seeds=seeds // 2 if scalar else seeds, scalar=scalar)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("features", "heads", "width"), [(512, 8, 16), (256, 4, 32), (128, 4, 32), (64, 2, 128), (128, 16, 16)]
)
@pytest.mark.parametrize(("decay", "scalar"), [("mild", False), ("mixed", False), ("mild", True)])
def test_perceive_sizes(features, heads, width, decay, scalar, poisoned):
    """Sizes of presets and of their switches: a group in one part and in several."""
    SHAPES["size"] = (1, 150, 2, features, heads, width, None)
    earn_perceive("size", decay, torch.bfloat16, seeds=1, scalar=scalar)


@pytest.mark.parametrize("keys", ["equal", "alternating", "orthogonal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hostile_keys_stay_bounded(keys, dtype):
    T, F = 512, 16
    basis = torch.linalg.qr(torch.randn(F, F, generator=torch.Generator().manual_seed(0)))[0]
    t = torch.arange(T)
    k = {"equal": basis[t * 0], "alternating": basis[0] + (t % 2)[:, None] * basis[1], "orthogonal": basis[t % F]}[keys]
    k = torch.nn.functional.normalize(k, dim=-1)[None, :, None].to(dtype).to(DEVICE)
    w = torch.randn(1, T, 1, 1, 16, generator=torch.Generator().manual_seed(1)).to(dtype).to(DEVICE)
    zero = torch.zeros(1, T, 1, 1, device=DEVICE)
    y, state = perceive(k, k, 1.98 * k, w, zero, backend="triton")
    # 0.98^n of each write remains, and a write is below 6: 6 / 0.02 bounds any sum of them.
    assert y.isfinite().all() and state.norm() < 6 * 50 * 16


def test_two_runs_are_bit_equal():
    inputs = [x.to(DEVICE) for x in perceive_inputs(1, 100, 1, 16, 2, 16, dtype=torch.float32)]
    first, second = (with_gradients(run_perceive(None)("triton"), [*inputs, None]) for _ in range(2))
    for a, b in zip([*first[0], *first[1]], [*second[0], *second[1]], strict=True):
        assert torch.equal(a, b)


def test_activation_checkpointing_gives_the_same_gradients():
    """It hands saved tensors out once."""
    inputs = [x.to(DEVICE).float() for x in perceive_inputs(1, 40, 1, 16, 1, 16, seed=0)]
    found = []
    for again in (False, True):
        own = [x.clone().requires_grad_() for x in inputs]

        def run(*given):
            return perceive(*given, backend="triton")[0]

        y = checkpoint(run, *own, use_reentrant=False) if again else run(*own)
        y.sum().backward()
        found.append([x.grad for x in own])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_compiled_before_anything_ran():
    """Tracing must leave nothing behind: sizes that no other test has, compiled first."""
    inputs = [x.to(DEVICE) for x in perceive_inputs(1, 77, 1, 16, 2, 16, dtype=torch.bfloat16)]
    inputs[4] = inputs[4].float()
    compiled = torch.compile(run_perceive(None)("triton"), backend="aot_eager", fullgraph=True)
    first, second = (with_gradients(run, inputs) for run in (compiled, run_perceive(None)("triton")))
    for a, b in zip([*first[0], *first[1]], [*second[0], *second[1]], strict=True):
        assert torch.equal(a, b)


def test_memorise_compiles_whole():
    def run(q, k, w, sink):
        y, units = memorise(q, k, w, q.detach().float().sum(-1), sink, block=32, slots=8, backend="triton")
        return y, units.keys, units.values

    q, k, w, _, sink = (x.to(DEVICE) for x in memorise_inputs(1, 79, 1, 16, 2, 16, dtype=torch.bfloat16))
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    first, second = (with_gradients(r, [q, k, w, sink.float()]) for r in (compiled, run))
    for a, b in zip([*first[0], *first[1]], [*second[0], *second[1]], strict=True):
        assert torch.equal(a, b)


# -- memorise ------------------------------------------------------------------------------------------------------

# B, T, G, R, m, V, block, slots, cu_seqlens, tokens read before
MEMORIES = {
    "plain": (2, 150, 1, 16, 2, 8, 64, 16, None, 0),
    "short-block": (1, 70, 2, 16, 1, 16, 32, 8, None, 0),
    "no-slots": (1, 80, 1, 16, 1, 16, 32, 0, None, 0),
    "packed": (1, 150, 2, 16, 2, 8, 32, 8, [0, 0, 40, 41, 150], 0),
    "carried": (2, 100, 1, 16, 1, 16, 32, 8, None, 45),
    "carried-whole-blocks": (2, 50, 1, 16, 1, 16, 32, 8, None, 64),
    "packed-carried": (1, 100, 1, 16, 1, 16, 32, 8, [0, 33, 100], 45),
}


def earn_memorise(case: str, activation: str, dtype: torch.dtype, seeds: int) -> None:
    B, T, G, R, m, V, block, slots, cu, before = MEMORIES[case]
    size = {"block": block, "slots": slots}
    bounds = None if cu is None else torch.tensor(cu)
    N = B if cu is None else len(cu) - 1
    earned = Earned("y keys values dq dk dw dsink" + (" dkeys dvalues" if before else ""))

    def one(seed: int) -> None:
        q, k, w, score, sink = memorise_inputs(B, T, G, R, m, V, seed=seed, dtype=dtype)
        score = score.float()
        units = None
        if before:
            first = memorise_inputs(N, before, G, R, m, V, seed=seed + 100, dtype=dtype)
            units = memorise(*first[:3], first[3].float(), first[4], **size)[1]
        kept = {}

        def of(backend: str) -> Run:
            def run(q, k, w, sink, *carried):
                wide = torch.float64 if q.dtype == torch.float64 else torch.float32
                own = None
                if units is not None:
                    own = units._replace(
                        keys=carried[0],
                        values=carried[1],
                        scores=units.scores.to(wide).to(q.device),
                        length=units.length.to(q.device),
                    )
                y, after = memorise(
                    q, k, w, score.to(wide).to(q.device), sink, own, activation=activation, cu_seqlens=bounds,
                    backend=backend, **size,
                )  # fmt: skip
                kept[backend] = after.scores.cpu().double(), after.length.cpu()
                return y, after.keys, after.values

            return run

        earned.add(of, [q, k, w, sink, *([units.keys, units.values] if units is not None else [])])
        for a, b in zip(kept["triton"], kept["reference"], strict=True):
            assert torch.equal(a, b)  # given the same scores, exactly the reference's rows

    for seed in range(seeds):
        one(seed)
    earned.check()


@pytest.mark.parametrize("activation", ["relu2", "softmax"])
@pytest.mark.parametrize("case", MEMORIES)
def test_memorise(case, activation, poisoned):
    earn_memorise(case, activation, torch.float32, seeds=3)


@pytest.mark.parametrize("activation", ["relu2", "softmax"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_memorise_in_16_bits(dtype, activation, poisoned):
    earn_memorise("plain", activation, dtype, seeds=2)


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["relu2", "softmax"])
@pytest.mark.parametrize("case", MEMORIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memorise_over_seeds(case, activation, dtype, poisoned):
    earn_memorise(case, activation, dtype, seeds=32)


# B, T, cu_seqlens, block, slots, tokens read before, blocks taken in one by one
CHOICES = {
    "one chain": (3, 100, None, 16, 8, 0, 24),
    "spans": (1, 300, None, 16, 16, 32, 4),
    "spans of many": (2, 150, None, 16, 5, 41, 3),
    "spans, packed": (1, 400, [0, 3, 3, 250, 251, 400], 16, 8, 0, 4),
    "spans, packed, carried": (1, 400, [0, 3, 3, 250, 251, 400], 16, 8, 21, 4),
    "more slots than rows": (1, 60, None, 8, 20, 0, 24),
}


@pytest.mark.parametrize("unknown", [False, True], ids=["", "lengths on a GPU"])
@pytest.mark.parametrize("case", CHOICES)
def test_the_same_slots(case, unknown, monkeypatch, poisoned):
    """Scores with many ties and rows that are never kept: the units that are left, to the bit, and what is read."""
    from llm_mlp.ops import layout
    from llm_mlp.ops.memorise import kernels

    if unknown:  # every sequence gets room for the longest open block, so that empty blocks follow
        monkeypatch.setattr(layout, "_known", lambda lead: None)
        monkeypatch.setattr(kernels, "is_fresh", lambda *_: False)

    B, T, cu, block, slots, before, chain = CHOICES[case]
    monkeypatch.setattr(kernels, "CHAIN", chain)
    make = torch.Generator().manual_seed(3)
    bounds = None if cu is None else torch.tensor(cu)
    size = {"block": block, "slots": slots}

    def inputs(B: int, T: int) -> list[torch.Tensor]:
        q, k, w, score, sink = memorise_inputs(B, T, 2, 16, 1, 16, seed=B + T, dtype=torch.float32)
        score = torch.randint(0, 6, score.shape, generator=make).float()
        return [x.to(DEVICE) for x in (q, k, w, torch.where(score == 0, -torch.inf, score), sink.float())]

    units = None
    if before:
        units = memorise(*inputs(B if cu is None else len(cu) - 1, before), backend="chunked", **size)[1]
    given = inputs(B, T)
    (y, after), (y2, after2) = (
        memorise(*given, units, cu_seqlens=bounds, backend=backend, **size) for backend in ("triton", "chunked")
    )
    for name, a, b in zip(after._fields, after, after2, strict=True):
        assert torch.equal(a, b), name
    assert (after.scores[:, :, :slots] > -torch.inf).any()
    torch.testing.assert_close(y, y2, rtol=1e-4, atol=1e-5)


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"F": 24}, "F = 24"),
        ({"m": 20, "V": 16}, "m = 20 heads of V = 16"),
        ({"dtype": torch.float64}, "dtype torch.float64"),
    ],
)
def test_what_perceive_does_not_serve_is_named(change, says):
    sizes = {"B": 1, "T": 4, "G": 1, "F": 16, "m": 1, "V": 16, "dtype": torch.float32, **change}
    with pytest.raises(ValueError, match=f"perceive: backend 'triton' cannot run: it does not serve {says}"):
        perceive(*(x.to(DEVICE) for x in perceive_inputs(**sizes)), backend="triton")


def test_what_memorise_does_not_serve_is_named():
    with pytest.raises(ValueError, match="memorise: backend 'triton' cannot run: it does not serve R = 8"):
        inputs = [x.to(DEVICE) for x in memorise_inputs(1, 4, 1, 8, 1, 16, dtype=torch.float32)]
        memorise(*inputs, block=8, slots=2, backend="triton")


def test_no_device_and_no_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"not on a CUDA device \(TRITON_INTERPRET=1 runs kernels on a CPU, slowly\)"):
        perceive(*perceive_inputs(1, 4, 1, 16, 1, 16, dtype=torch.float32), backend="triton")
