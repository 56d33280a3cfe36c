"""What a kernel's check runs: an op's kernels, and plain torch in the same dtype and in float64, on the same inputs.

The rule: a tensor passes whose root mean square error is at most twice that of `chunked`, or 2 eps of its dtype times
the truth's root mean square, and whose largest error is at most three times as large as allowed on that count; four
times where it has under 1,000 numbers, whose error is chance. The truth is `chunked` in float64 on the rounded inputs.
Each entry of ``_CASES`` gives, for the sizes that `llm_mlp.ops.tune` knows a launch by, a `Case` or several.

Of ops that choose what is memorised the rows are counted that float64 chooses and the kernels do not (`Found`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llm_mlp.ops.tune import Found, Sizes


class Case(NamedTuple):
    """A function (of a backend: a function of the inputs) and its inputs."""

    run: Callable[[str], Callable[..., Sequence[Tensor]]]
    inputs: list[Tensor]
    keys: int = -1  # which of the outputs are memorised keys [N, G, slots + block, R], if any are
    slots: int = 0


def compare(
    names: Sequence[str],
    got: Sequence[Tensor],
    yard: Sequence[Tensor],
    truth: Sequence[Tensor],
    largest: float = 3,
) -> list[str]:
    """What the rule above says of the tensors; ``largest``: how far it lets the largest error go."""
    failures = []
    for name, g, y, t in zip(names, got, yard, truth, strict=True):
        if not g.isfinite().all():
            failures.append(f"{name}: not finite")
            continue
        if not t.numel():
            continue
        mine, other = g.double() - t, y.double() - t
        few = 4 if t.numel() < 1000 else 1
        floor = 2 * torch.finfo(g.dtype).eps * float(t.square().mean().sqrt())
        for what, a, b, slack in (
            ("rms", mine.square().mean().sqrt(), other.square().mean().sqrt(), 1),
            ("largest", mine.abs().max(), other.abs().max(), largest),
        ):
            if not float(a) <= few * slack * max(2 * float(b), floor):
                failures.append(f"{name}: {what} error {float(a):.3g}, of chunked {float(b):.3g}")
    return failures


def choices(got: Tensor, truth: Tensor) -> tuple[int, int]:
    """Of memorised keys ``[N, G, slots, R]`` how many rows the truth has in use, and how many ``got`` does not hold.

    Rows are told by their place in space: a token's are nearer each other than half their length in any dtype, while
    those of two tokens, random in all the checks, are not.
    """
    got, truth = got.detach().double(), truth.detach().double()
    length = truth.norm(dim=-1)
    near = torch.cdist(truth, got) < length[..., None] / 2
    used = length > 0
    return int(used.sum()), int((used & ~near.any(-1)).sum())


def both_ways(run: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Outputs, and gradients of a fixed random projection of them."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    outputs = [o for o in run(*leaves) if o.is_floating_point()]
    generator = torch.Generator().manual_seed(0)
    leaves = [x for x in leaves if x.requires_grad]
    loss = sum(
        (o.double() * torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.device)).sum()
        for o in outputs
    )
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)  # type: ignore[arg-type]
    return [o.detach() for o in outputs] + [g for g in grads if g is not None]


def _forward_only(run: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> list[Tensor]:
    return list(run(*(x.detach().clone() for x in inputs)))


def _perceive_cases(F: int, m: int, V: int, scalar: bool, dtype: torch.dtype, device: str) -> list[Case]:
    from llm_mlp.ops.perceive import kernels, perceive

    B, T, G = 2, 200, 2
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    q, k = (torch.nn.functional.normalize(normal(B, T, G, F), dim=-1).to(dtype) for _ in range(2))
    beta = 1.9 * torch.rand((B, T, G), generator=generator)
    e = beta if scalar else (k.float() * beta[..., None]).to(dtype)
    w, state = normal(B, T, G, m, V).to(dtype), normal(B, G, F, m, V)
    mild = -torch.rand((B, T, G, m), generator=generator) / 8
    wild = torch.where(torch.rand((B, T, G, m), generator=generator) < 0.02, -torch.inf, mild * 40)
    wild[0] = mild[0]

    def run(backend: str, spans: bool) -> Callable:
        def call(*x: Tensor) -> Sequence[Tensor]:
            before = kernels.SPAN, kernels.FULL
            if spans:
                kernels.SPAN, kernels.FULL = 64, 10**6
            try:
                return perceive(*x, return_residual=True, backend=backend)
            finally:
                kernels.SPAN, kernels.FULL = before

        return call

    def inputs(decay: Tensor) -> list[Tensor]:
        return [x.to(device) for x in (q, k, e, w, decay, state)]

    return [
        Case(partial(run, spans=spans), inputs(decay)) for decay, spans in ((mild, False), (wild, False), (wild, True))
    ]


def _memorise_cases(R: int, width: int, activation: str, dtype: torch.dtype, device: str) -> list[Case]:
    from llm_mlp.ops.memorise import memorise

    B, T, G = 2, 300, 2
    size: dict[str, Any] = {"block": 128, "slots": 32, "activation": activation}
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    q, k, w = normal(B, T, G, R), normal(B, T, G, R), normal(B, T, G, 1, width)
    score = torch.rand((B, T, G), generator=generator).to(device)
    sink = torch.zeros(G, device=device)

    def run(backend: str, carried: bool) -> Callable:
        def call(q: Tensor, k: Tensor, w: Tensor, sink: Tensor) -> Sequence[Tensor]:
            own = score.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
            if not carried:
                y, units = memorise(q, k, w, own, sink, **size, backend=backend)
                return y, units.keys, units.values
            first, units = memorise(q[:, :200], k[:, :200], w[:, :200], own[:, :200], sink, **size, backend=backend)
            y, units = memorise(
                q[:, 200:], k[:, 200:], w[:, 200:], own[:, 200:], sink, units, **size, backend=backend
            )  # fmt: skip
            return first, y, units.keys, units.values

        return call

    inputs = [q, k, w, sink]
    return [
        Case(partial(run, carried=carried), inputs, keys, size["slots"]) for carried, keys in ((False, 1), (True, 2))
    ]


def _heads_cases(R: int, V: int, dtype: torch.dtype, device: str) -> list[Case]:
    from llm_mlp.ops.heads import head_inputs, head_outputs

    B, T, G, m, K = 2, 150, 1, 2, 4
    width, C = G * m * V, 2 * G * R + G * m * V
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    if not R:  # what comes after the ops has none
        rows = (B, T, G, m)
        inputs = [x.to(dtype) for x in (normal(*rows, V), normal(*rows, V), normal(*rows), normal(B, T, width))]
        return [Case(lambda backend: lambda *x: [head_outputs(*x, eps=1e-6, backend=backend)], inputs)]

    def run(backend: str, normalize: bool = True) -> Callable:
        def call(x: Tensor, conv: Tensor, slope: Tensor, write: Tensor, gain: Tensor, *tail: Tensor):
            found, new = head_inputs(
                x, conv, slope, write, gain, *tail,
                groups=G, heads=(m, V), eps=1e-6, normalize=normalize, backend=backend,
            )  # fmt: skip
            return [y for y in (*found, new) if y is not None]

        return call

    inputs = [normal(B, T, C).to(dtype), normal(C, K) / 2, 1 + normal(C) / 4]
    inputs += [normal(B, T, width).to(dtype), 1 + normal(2, R) / 4]
    carried = [*inputs, normal(B, K - 1, C).to(dtype)]
    return [Case(run, inputs), Case(run, carried), Case(partial(run, normalize=False), carried)]


def _first_layer_cases(R: int, F: int, dtype: torch.dtype, device: str) -> list[Case]:
    from llm_mlp.ops.wide import first_layer

    normal, G = _normals(1, device), 2
    inputs = [normal(300, G, R).to(dtype), (1.5 * normal(G, R, F) / R**0.5).to(dtype), 1 + normal(G, F) / 4]

    def run(backend: str) -> Callable:
        return lambda z, weight, *slope: [first_layer(z, weight, *(slope or (None,)), eps=1e-6, backend=backend)]

    return [Case(run, inputs), Case(run, inputs[:2])]


def _cross_entropy_cases(dtype: torch.dtype, device: str) -> list[Case]:
    from llm_mlp.ops.cross_entropy import linear_cross_entropy

    n, D, vocabulary = 300, 64, 5003
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn((r, D), generator=generator).to(dtype).to(device) for r in (n, vocabulary))
    targets = torch.randint(vocabulary, (n,), generator=generator).to(device)
    targets[::7] = -100

    def run(cap: float) -> Callable:
        def of(backend: str) -> Callable:
            return lambda h, w: [linear_cross_entropy(h, w, targets, cap=cap, backend=backend)]

        return of

    return [Case(run(cap), [hidden, weight]) for cap in (0.0, 15.0)]


def _normals(seed: int, device: str) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator).to(device)


def _perceive_step_cases(
    F: int, m: int, V: int, scalar: bool, state: str, dtype: torch.dtype, device: str
) -> list[Case]:
    from llm_mlp.ops.perceive import perceive_step

    B, N, G = 3, 5, 2
    normal, unit = _normals(1, device), torch.nn.functional.normalize
    q, k = (unit(normal(B, G, F), dim=-1).to(dtype) for _ in range(2))
    e = normal(B, G).sigmoid() if scalar else k * normal(B, G, 1).sigmoid().to(dtype)
    inputs = [q, k, e, normal(B, G, m, V).to(dtype), -normal(B, G, m).abs()]
    inputs.append(normal(N, G, F, m, V).to(getattr(torch, state)))

    def run(rows: list[int] | None) -> Callable:
        def of(backend: str) -> Callable:
            def call(*x: Tensor) -> Sequence[Tensor]:
                q, k, e, w, decay, states = x
                states = states[:B].clone() if rows is None else states.clone()
                at = None if rows is None else torch.tensor(rows, device=device)
                found = perceive_step(q, k, e, w, decay, states, at, return_residual=True, backend=backend)
                return *found, states

            return call

        return of

    return [Case(run(rows), inputs) for rows in (None, [4, -1, 0])]


def _memorise_step_cases(
    R: int, width: int, block: int, slots: int, activation: str, rows: str, dtype: torch.dtype, device: str
) -> list[Case]:
    from llm_mlp.ops.memorise import memorise_step, units_init

    B, G, N = 3, 2, 5
    normal = _normals(1, device)
    tokens = [
        (normal(B, G, R).to(dtype), normal(B, G, R).to(dtype), normal(B, G, 1, width).to(dtype)) for _ in range(4)
    ]
    scores = [normal(B, G).abs() for _ in tokens]
    start = units_init(
        N, G, R, 1, width, block=block, slots=slots, dtype=getattr(torch, rows), device=torch.device(device)
    )
    # Sequences that are about to fill their first block, their fourth, and in the middle of one; their rows are filled.
    length = torch.tensor([block - 2, 4 * block - 1, 3 * block + block // 2, 0, block - 1], device=device)
    place = torch.arange(slots + block, device=device)
    used = (place < torch.where(length >= block, slots, 0)[:, None]) | (
        (place >= slots) & (place - slots < (length % block)[:, None])
    )
    kept = torch.where(used[:, None], normal(N, G, slots + block).abs(), -torch.inf)
    kept[..., :slots] = kept[..., :slots].sort(-1, descending=True).values
    inputs = [*(x for token in tokens for x in token)]
    inputs += [torch.where(used[:, None, :, None], normal(N, G, slots + block, R), 0).to(start.keys.dtype)]
    inputs += [torch.where(used[:, None, :, None], normal(N, G, slots + block, width), 0).to(start.keys.dtype)]

    def run(at: list[int] | None) -> Callable:
        def of(backend: str) -> Callable:
            def call(*x: Tensor) -> Sequence[Tensor]:
                units = start._replace(
                    keys=x[-2].clone(), values=x[-1].unsqueeze(3).clone(), scores=kept.clone(), length=length.clone()
                )
                if x[-1].dtype == torch.float64:
                    units = units._replace(scores=kept.double())
                if at is None:
                    units = type(units)(*(y[:B].clone() for y in units))
                index = None if at is None else torch.tensor(at, device=device)
                found = []
                for n, score in enumerate(scores):
                    q, k, w = x[3 * n : 3 * n + 3]
                    own, sink = score.to(units.scores.dtype), torch.zeros(G, device=device)
                    form: dict[str, Any] = {"block": block, "slots": slots, "activation": activation}
                    found.append(memorise_step(q, k, w, own, sink, units, index, **form, backend=backend))
                rows = (y.float() if y.dtype.itemsize == 1 else y for y in (units.keys, units.values))
                return *found, *rows, units.scores.nan_to_num(neginf=-1.0).to(x[0].dtype)

            return call

        return of

    return [Case(run(at), inputs, len(tokens), slots) for at in (None, [4, -1, 1])]


def _heads_step_cases(R: int, V: int, dtype: torch.dtype, device: str) -> list[Case]:
    from llm_mlp.ops.heads import head_inputs_step

    B, N, G, m, K = 3, 5, 2, 2, 4
    C, normal = 2 * G * R + G * m * V, _normals(1, device)
    inputs = [normal(B, C).to(dtype), normal(C, K) / 2, 1 + normal(C) / 4, normal(B, G * m * V).to(dtype)]
    inputs += [1 + normal(2, R) / 4, normal(N, K - 1, C).to(dtype)]

    def run(rows: list[int] | None, normalize: bool = True) -> Callable:
        def of(backend: str) -> Callable:
            def call(*x: Tensor) -> Sequence[Tensor]:
                tails = (x[-1][:B] if rows is None else x[-1]).clone()
                index = None if rows is None else torch.tensor(rows, device=device)
                token, conv, slope, write, gain, _ = x
                found = head_inputs_step(
                    token, conv, slope, write, gain, tails, index,
                    groups=G, heads=(m, V), eps=1e-6, normalize=normalize, backend=backend,
                )  # fmt: skip
                real = [b for b in range(B) if rows is None or rows[b] >= 0]
                return *(y[real] for y in found if y is not None), tails

            return call

        return of

    return [Case(run(None), inputs), Case(run([4, -1, 0]), inputs), Case(run(None, False), inputs)]


def _linear_step_cases(eight: bool, dtype: torch.dtype, device: str) -> list[Case]:
    from llm_mlp.ops.linear_step import Product, linear_step
    from llm_mlp.ops.linear_step.quantized import Int8

    normal = _normals(1, device)

    def of(B: int, eps: float | None, relu2: bool, residual: bool, *sizes: tuple[int, int, int]) -> Case:
        D = max(begin + K for _, K, begin in sizes)
        tensors = [normal(B, D), *(normal(N, K) / K**0.5 for N, K, _ in sizes), *(normal(N) for N, _, _ in sizes)]
        tensors += [normal(B, sizes[0][0])] if residual else []
        # One matrix of several stays as it is: they are mixed.
        fixed = {i: Int8.of(tensors[1 + i]) for i in range(len(sizes)) if eight and i != 1}

        def run(backend: str) -> Callable:
            def call(x: Tensor, *more: Tensor) -> Sequence[Tensor]:
                n = len(sizes)
                products = [Product(fixed.get(i, more[i]), more[n + i], sizes[i][2]) for i in range(n)]
                base = more[-1] if residual else None
                return linear_step(x, products, eps=eps, relu2=relu2, residual=base, backend=backend)

            return call

        return Case(run, [x.to(dtype) for x in tensors])

    return [
        case
        for B in ((1,) if dtype == torch.float32 else (1, 3, 16))
        for case in (
            of(B, 1e-6, False, False, (2500, 1024, 0), (70, 1024, 0)),
            of(B, 1e-6, True, False, (300, 576, 0)),
            of(B, None, False, True, (300, 4096, 0)),
            of(B, None, False, False, (1024, 64, 128), (8, 64, 0), (300, 64, 64)),
        )
    ]


def _gates_step_cases(R: int, V: int, dtype: torch.dtype, device: str) -> list[Case]:
    from llm_mlp.ops.heads import gates_step

    B, G, m, normal = 3, 2, 3, _normals(1, device)

    def run(backend: str) -> Callable:
        def call(heads: Tensor, rate: Tensor, erase: Tensor) -> Sequence[Tensor]:
            found = gates_step(heads, heads, rate, erase, shape=(G, m), erase_max=1.98, backend=backend)
            return [x for x in found if x is not None]

        return call

    return [Case(run, [8 * normal(B, 2 * G * m).to(dtype), -3 + normal(G * m), 4 * normal(B, G).to(dtype)])]


def _perception_step_cases(
    R: int, m: int, V: int, taps: int, rank: int, block: int, slots: int, activation: str, states: str, rows: str,
    dtype: torch.dtype, device: str,
) -> list[Case]:  # fmt: skip
    from llm_mlp.ops.memorise import units_init
    from llm_mlp.ops.perception_step import Gate, Layer, State, perception_step

    B, N, G, tokens = 3, 5, 2, 3
    H, C, normal = G * m, 2 * G * R + G * m * V, _normals(1, device)
    units = units_init(N, G, R, m, V, block=block, slots=slots, dtype=getattr(torch, rows), device=torch.device(device))
    # Sequences at their start, about to fill their first block, their fourth, and in the middle of one.
    units.length.copy_(torch.tensor([block - 2, 4 * block - 1, 3 * block + block // 2, 0, block - 1], device=device))
    place = torch.arange(slots + block, device=device)
    used = (place < torch.where(units.length >= block, slots, 0)[:, None]) | (
        (place >= slots) & (place - slots < (units.length % block)[:, None])
    )
    kept = torch.where(used[:, None], normal(N, G, slots + block).abs(), -torch.inf)
    kept[..., :slots] = kept[..., :slots].sort(-1, descending=True).values
    gates = [normal(n, rank) / rank**0.5 for n in (H * V, G, H * V)], [normal(n) for n in (H * V, G, H * V)]
    inputs = [*(normal(B, C + 3 * rank) for _ in range(tokens)), *(normal(B, 2 * H) for _ in range(tokens))]
    inputs = [x.to(dtype) for x in (*inputs, *gates[0], *gates[1])]
    inputs += [normal(C, taps) / 2, 1 + normal(C) / 4, 1 + normal(2, R) / 4, normal(H) - 3, normal(G)]
    inputs += [normal(N, taps - 1, C).to(dtype), (normal(N, G, R, m, V) / R**0.5).to(getattr(torch, states))]
    for x, shape in ((units.keys, (R,)), (units.values, (m, V))):
        numbers = torch.where(used[:, None, :, None], normal(N, G, slots + block, x[0, 0, 0].numel()), 0)
        inputs.append(numbers.unflatten(-1, shape).to(x.dtype))

    def run(at: list[int] | None) -> Callable:
        def of(backend: str) -> Callable:
            def call(*x: Tensor) -> Sequence[Tensor]:
                t = 2 * tokens
                write, erase, output = (Gate(x[t + n], x[t + 3 + n], C + n * rank) for n in range(3))
                conv, slope, gain, rate, sink = x[t + 6 : t + 11]
                layer = Layer(
                    G, (m, V), write, erase, output, conv, slope, gain, rate, sink, 1.98, 1e-6, block, slots, activation
                )
                scores = kept.double() if x[0].dtype == torch.float64 else kept.clone()
                pool = [y.clone() for y in (*x[t + 11 :], scores, units.length)]
                if at is None:
                    pool = [y[:B].clone() for y in pool]
                tails, fast, keys, values, scores, length = pool
                state = State(tails, fast, units._replace(keys=keys, values=values, scores=scores, length=length))
                index = None if at is None else torch.tensor(at, device=device)
                real = [n for n in range(B) if at is None or at[n] >= 0]
                found = [
                    perception_step(x[n], x[tokens + n], layer, state, index, backend)[real] for n in range(tokens)
                ]
                kinds = (y.float() if y.dtype.itemsize == 1 else y for y in (keys, values))
                return *found, tails, fast, *kinds, scores.nan_to_num(neginf=-1.0).to(x[0].dtype)

            return call

        return of

    return [Case(run(at), inputs, tokens + 2, slots) for at in (None, [4, -1, 1])]


_CASES: dict[str, Callable[..., list[Case]]] = {
    "perceive": _perceive_cases,
    "memorise": _memorise_cases,
    "heads": _heads_cases,
    "first_layer": _first_layer_cases,
    "cross_entropy": _cross_entropy_cases,
    "perceive_step": _perceive_step_cases,
    "memorise_step": _memorise_step_cases,
    "heads_step": _heads_step_cases,
    "gates_step": _gates_step_cases,
    "linear_step": _linear_step_cases,
    "perception_step": _perception_step_cases,
}


def check(op: str, sizes: Sizes, device: str) -> Found:
    """What the kernels of an op get wrong at these sizes on a device, and how many choices they make otherwise."""
    constants: dict[str, Any] = dict(sizes)
    dtype = getattr(torch, constants.pop("dtype"))
    before = torch.get_float32_matmul_precision()
    # Beside 16-bit inputs the kernels multiply float32 in fewer bits; so may the yardstick.
    torch.set_float32_matmul_precision("highest" if dtype == torch.float32 else "high")
    try:
        return _found(op, _CASES[op](**constants, dtype=dtype, device=device))
    finally:
        torch.set_float32_matmul_precision(before)


def _found(op: str, cases: list[Case]) -> Found:
    failures, slots, differing = list[str](), 0, 0
    ways = _forward_only if op.endswith("_step") else both_ways
    for number, case in enumerate(cases):
        truth = ways(case.run("chunked"), [x.double() for x in case.inputs])
        yard, got, again = (ways(case.run(backend), case.inputs) for backend in ("chunked", "triton", "triton"))
        names = [f"case {number}, tensor {n}" for n in range(len(got))]
        failures += compare(names, got, yard, truth)
        failures += [
            f"{n}: two runs differ" for n, a, b in zip(names, got, again, strict=True) if not torch.equal(a, b)
        ]
        if case.slots:
            more, other = choices(*(found[case.keys][:, :, : case.slots] for found in (got, truth)))
            slots, differing = slots + more, differing + other
    return Found(failures, slots, differing)
