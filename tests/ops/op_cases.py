"""Inputs for the ops, and naive implementations written from the equations, not from the package."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llm_mlp.ops import Units

TOLERANCE = 1e-9
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of the kernels

Run = Callable[..., Sequence[Tensor]]


def close(a: Tensor, b: Tensor, tolerance: float = TOLERANCE, what: str = "") -> None:
    """Equal shapes and dtypes; equal infinities; elsewhere within ``tolerance``; no NaN on either side."""
    assert a.shape == b.shape, (what, tuple(a.shape), tuple(b.shape))
    assert a.dtype == b.dtype, (what, a.dtype, b.dtype)
    if not a.numel():
        return
    assert not a.isnan().any() and not b.isnan().any(), f"{what}: NaN"
    finite = a.isfinite()
    assert torch.equal(finite, b.isfinite()), f"{what}: infinite in different places"
    assert torch.equal(a[~finite], b[~finite]), f"{what}: different infinities"
    worst = (a[finite] - b[finite]).abs().max().item() if finite.any() else 0.0
    assert worst <= tolerance, f"{what}: differs by {worst:.3g}"


def all_close(a: Sequence[Tensor], b: Sequence[Tensor], tolerance: float = TOLERANCE, what: str = "") -> None:
    assert len(a) == len(b), what
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        close(x, y, tolerance, f"{what} [{i}]")


def with_gradients(
    run: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor | None], seed: int = 5
) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs of ``run(*inputs)`` and the gradients of a random projection of them to every input that is not None.

    The projection depends on the outputs' shapes alone, so two implementations are compared on the same one.
    """
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
    outputs = list(run(*leaves))
    generator = torch.Generator().manual_seed(seed)
    loss = sum(
        (o.double() * torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.device)).sum()
        for o in outputs
    )
    wanted = [x for x in leaves if x is not None]
    if not loss.requires_grad:
        return [o.detach() for o in outputs], [torch.zeros_like(x) for x in wanted]
    grads = torch.autograd.grad(loss, wanted, allow_unused=True)
    grads = [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, grads, strict=True)]
    return [o.detach() for o in outputs], grads


def sequences(bounds: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(bounds[:-1], bounds[1:], strict=True))


class Earned:
    """Errors of the kernels and of the yardstick, pooled over seeds."""

    def __init__(self, names: str) -> None:
        self.names = names.split()
        self.sums: dict[str, list[float]] = {name: [0.0, 0.0, 0.0, 0.0, 0.0, 0.0] for name in self.names}
        self.eps: dict[str, float] = {}

    def add(self, run: Callable[[str], Run], inputs: Sequence[Tensor]) -> None:
        """``run(backend)`` takes the inputs; outputs and gradients are compared."""
        truth = with_gradients(run("reference"), [x.double() for x in inputs])
        on_device = [x.to(DEVICE) for x in inputs]
        if DEVICE == "cuda":  # the same rounding of operands: beside 16-bit inputs the kernels multiply float32 as TF32
            torch.set_float32_matmul_precision("highest" if inputs[0].dtype == torch.float32 else "high")
        yard, got = (with_gradients(run(backend), on_device) for backend in ("chunked", "triton"))
        tensors = zip([*got[0], *got[1]], [*yard[0], *yard[1]], [*truth[0], *truth[1]], strict=True)
        for name, (g, y, t) in zip(self.names, tensors, strict=True):
            assert g.shape == t.shape and g.dtype == y.dtype, name
            assert g.isfinite().all(), f"{name}: not finite"
            self.eps[name] = torch.finfo(g.dtype).eps
            mine, other = (x.double().cpu() - t for x in (g, y))
            s = self.sums[name]
            for i, x in enumerate((mine, other, t)):
                s[i] += float(x.square().sum())
            s[3] = max(s[3], float(mine.abs().max()) if t.numel() else 0.0)
            s[4] = max(s[4], float(other.abs().max()) if t.numel() else 0.0)
            s[5] += t.numel()

    def check(self) -> None:
        """On a device the rule as it stands. The interpreter multiplies and adds in two roundings where hardware takes
        one: 2.5 there. Below 1,000 pooled numbers an error's size is chance: 8, of the sums alone (slow tests pool).
        """
        for name, (mine, other, truth, worst, yard_worst, count) in self.sums.items():
            few = count < 1000
            factor = 8 if few else 2 if DEVICE == "cuda" else 2.5
            floor = factor * self.eps[name] * (truth / max(count, 1)) ** 0.5
            rms, yard = ((x / max(count, 1)) ** 0.5 for x in (mine, other))
            assert rms <= max(factor * yard, floor), f"{name}: rms {rms:.3g}, yardstick {yard:.3g}, floor {floor:.3g}"
            if not few:
                allowed = max(factor * yard_worst, floor)
                assert worst <= allowed, f"{name}: largest {worst:.3g}, yardstick {yard_worst:.3g}"


# -- perceive ----------------------------------------------------------------------------------------------------

# (B, G, F, m, V)
PERCEIVE_SHAPES = [(2, 2, 8, 3, 4), (1, 3, 4, 1, 2), (2, 1, 16, 2, 1)]
LENGTHS = [0, 1, 63, 64, 65, 200]
DECAYS = ["none", "mild", "resets", "twenty", "thousand", "mixed"]
# Sequences packed along T = 200: empty ones first, in the middle and last; one long; as long as a chunk; tiny ones.
PACKINGS = [
    [0, 0, 3, 70, 70, 200, 200],
    [0, 200],
    [0, 64, 128, 200],
    [0, 1, 2, 130, 131, 131, 200],
    [0, 0, 0, 200],
]


def perceive_inputs(
    B: int,
    T: int,
    G: int,
    F: int,
    m: int,
    V: int,
    *,
    decay: str = "mild",
    seed: int = 0,
    dtype=torch.float64,
    scalar: bool = False,
) -> list[Tensor]:
    """q, k (unit length), e (its own share of k for every feature and token, or one number a group), w, log_decay."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=g, dtype=torch.float64)

    q, k = normal(B, T, G, F), normal(B, T, G, F)
    k = k / k.norm(dim=-1, keepdim=True)
    e = k * uniform(B, T, G, 1) * 1.9 * (0.5 + 0.5 * uniform(B, T, G, F))
    w = normal(B, T, G, m, V)
    log_decay = torch.zeros(B, T, G, m, dtype=torch.float64)
    if decay != "none":
        log_decay = -0.3 * uniform(B, T, G, m) * (uniform(B, T, G, m) < 0.8)
    chance = uniform(B, T, G, m)
    if decay in ("resets", "mixed"):
        log_decay[chance < 0.04] = -torch.inf
    if decay in ("twenty", "mixed"):
        log_decay[(chance > 0.1) & (chance < 0.2)] = -20
    if decay in ("thousand", "mixed"):
        log_decay[(chance > 0.3) & (chance < 0.35)] = -1000
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if scalar:
        e = 1.9 * uniform(B, T, G)
    return [q.to(dtype), k.to(dtype), e.to(wide if scalar else dtype), w.to(dtype)] + [
        log_decay.to(torch.float64 if dtype == torch.float64 else torch.float32)
    ]


def perceive_state(N: int, G: int, F: int, m: int, V: int, *, seed: int = 1, dtype=torch.float64) -> Tensor:
    return torch.randn((N, G, F, m, V), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def naive_perceive(
    q: Tensor, k: Tensor, e: Tensor, w: Tensor, log_decay: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """u = w - e^T a S;  S <- a S + k u^T;  y = S^T q: one head and one token at a time."""
    B, T, G, F = q.shape
    m, V = w.shape[-2:]
    y, residual = torch.zeros(B, T, G, m, V, dtype=w.dtype), torch.zeros(B, T, G, m, dtype=w.dtype)
    last = torch.zeros(B, G, F, m, V, dtype=w.dtype)
    for b in range(B):
        for g in range(G):
            for h in range(m):
                S = torch.zeros(F, V, dtype=w.dtype) if state is None else state[b, g, :, h]
                for t in range(T):
                    S = torch.exp(log_decay[b, t, g, h]) * S
                    u = w[b, t, g, h] - S.T @ e[b, t, g]
                    S = S + torch.outer(k[b, t, g], u)
                    y[b, t, g, h] = S.T @ q[b, t, g]
                    residual[b, t, g, h] = (u * u).sum()
                last[b, g, :, h] = S
    return y, last, residual


# -- memorise ----------------------------------------------------------------------------------------------------


def memorise_inputs(
    B: int, T: int, G: int, R: int, m: int, V: int, *, scores: str = "ties", seed: int = 0, dtype=torch.float64
) -> list[Tensor]:
    """q, k, w, score, sink. ``ties``: scores are small integers, some -inf; ``distinct``: no two are equal."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    q, k, w = normal(B, T, G, R), normal(B, T, G, R), normal(B, T, G, m, V)
    chance = torch.rand((B, T, G), generator=g)
    if scores == "ties":
        score = torch.randint(0, 4, (B, T, G), generator=g).double()
        score[chance < 0.15] = -torch.inf
    elif scores == "lost":  # nothing may be kept
        score = torch.full((B, T, G), -torch.inf, dtype=torch.float64)
    else:
        score = normal(B, T, G)
    sink = normal(G)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return [x.to(dtype) for x in (q, k, w)] + [score.to(wide), sink.to(wide)]


def naive_memorise(
    q: Tensor | None,
    k: Tensor,
    w: Tensor,
    score: Tensor,
    sink: Tensor | None,
    units: Units | None = None,
    *,
    block: int,
    slots: int,
    activation: str = "relu2",
) -> tuple[Tensor | None, Units]:
    """Rows are numbered by age: carried slots, carried open block, tokens. Which are read is decided by numbers."""
    B, T, G, R = k.shape
    m, V = w.shape[-2:]
    kind = dict(dtype=w.dtype)
    wide = torch.float64 if w.dtype == torch.float64 else torch.float32
    if units is None:
        units = Units(
            torch.zeros(B, G, slots + block, R, dtype=k.dtype),
            torch.zeros(B, G, slots + block, m, V, **kind),
            torch.full((B, G, slots + block), -torch.inf, dtype=wide),
            torch.zeros(B, dtype=torch.long),
        )
    if block == 0:
        return torch.zeros(B, T, G, m, V, **kind), units._replace(length=units.length + T)
    y = torch.zeros(B, T, G, m, V, **kind)
    keys, values = torch.zeros(B, G, slots + block, R, **kind), torch.zeros(B, G, slots + block, m, V, **kind)
    scores = torch.full((B, G, slots + block), -torch.inf, dtype=wide)
    for b in range(B):
        length = int(units.length[b])
        opened = length % block
        for g in range(G):
            all_keys = torch.cat([units.keys[b, g, : slots + opened], k[b, :, g]])
            all_values = torch.cat([units.values[b, g, : slots + opened], w[b, :, g]])
            all_scores = units.scores[b, g, : slots + opened].tolist() + score[b, :, g].tolist()
            held = [j for j in range(slots) if all_scores[j] != -torch.inf]
            block_rows = list(range(slots, slots + opened))
            for t in range(T):
                block_rows.append(slots + opened + t)
                if q is not None and sink is not None:
                    seen = held + block_rows
                    z = (all_keys[seen] * q[b, t, g]).sum(-1) / R**0.5
                    if activation == "relu2":
                        weight = z.clamp(min=0) ** 2
                        share = weight / (weight.sum() + torch.exp(sink[g]))
                    else:
                        weight = torch.exp(z)
                        share = weight / (weight.sum() + torch.exp(sink[g]))
                    y[b, t, g] = (share[:, None, None] * all_values[seen]).sum(0)
                if (length + t + 1) % block == 0:
                    worthy = [j for j in held + block_rows if all_scores[j] != -torch.inf]
                    held = sorted(worthy, key=lambda j: (-all_scores[j], j))[:slots]
                    block_rows = []
            for row, j in enumerate(held):
                keys[b, g, row], values[b, g, row], scores[b, g, row] = all_keys[j], all_values[j], all_scores[j]
            for row, j in enumerate(block_rows):
                keys[b, g, slots + row], values[b, g, slots + row] = all_keys[j], all_values[j]
                scores[b, g, slots + row] = all_scores[j]
    return y, Units(keys, values, scores, units.length + T)


def carried_units(
    lengths: Sequence[int],
    G: int,
    R: int,
    m: int,
    V: int,
    *,
    block: int,
    slots: int,
    seed: int = 9,
    scores: str = "ties",
) -> Units:
    """Units of sequences that have seen ``lengths`` tokens, made by the naive implementation."""
    parts = []
    for n, length in enumerate(lengths):
        _, k, w, score, _ = memorise_inputs(1, length, G, R, m, V, seed=seed + n, scores=scores)
        parts.append(naive_memorise(None, k, w, score, None, block=block, slots=slots)[1])
    return Units(*(torch.cat(x) for x in zip(*parts, strict=True)))


def same_units(a: Units, b: Units, tolerance: float = TOLERANCE) -> None:
    for name, x, y in zip(Units._fields, a, b, strict=True):
        close(x, y, tolerance, f"units.{name}")


def copied(units: Units) -> Units:
    return Units(*(x.clone() for x in units))
