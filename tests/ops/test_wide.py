"""`first_layer` and `perceive_wide`: plain torch against the equations, kernels against plain torch."""

from __future__ import annotations

import pytest
import torch
from op_cases import DEVICE, Earned, all_close, close, naive_perceive, perceive_inputs, perceive_state, with_gradients

from llm_mlp.ops import first_layer, perceive_wide

EPS = 1e-6


def layer(G, R, F, seed=3):
    g = torch.Generator().manual_seed(seed)
    weight = 1.5 * torch.randn((G, R, F), generator=g, dtype=torch.float64) / R**0.5
    return weight, 1 + torch.randn((G, F), generator=g, dtype=torch.float64) / 4


def naive_first_layer(z, weight, slope):
    out = torch.zeros(*z.shape[:-1], weight.shape[-1], dtype=z.dtype)
    for g in range(z.shape[-2]):
        x = z[..., g, :]
        y = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() @ weight[g]
        a = y / (1 + torch.exp(-y * (1.0 if slope is None else slope[g])))
        out[..., g, :] = a / a.square().sum(-1, keepdim=True).sqrt()
    return out


def wide_inputs(B, T, G, R, F, m, V, *, decay="mild", seed=0, dtype=torch.float64, N=None):
    """q, k, weight, slope, beta, w, log_decay, state."""
    q, _, _, _, _ = perceive_inputs(B, T, G, R, m, V, seed=seed, dtype=dtype)
    k, _, beta, w, log_decay = perceive_inputs(B, T, G, R, m, V, decay=decay, seed=seed + 100, dtype=dtype, scalar=True)
    weight, slope = layer(G, R, F, seed)
    state = perceive_state(N or B, G, F, m, V, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return [q, k, weight.to(dtype), slope.to(state.dtype), beta, w, log_decay, state]


@pytest.mark.parametrize("sloped", [True, False])
def test_first_layer_is_its_equation(sloped):
    z = torch.randn((2, 5, 3, 8), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight, slope = layer(3, 8, 32)
    slope = slope if sloped else None
    found = first_layer(z, weight, slope, eps=EPS)
    close(found, naive_first_layer(z, weight, slope))
    close(found.norm(dim=-1), torch.ones(2, 5, 3, dtype=torch.float64))
    assert torch.autograd.gradcheck(
        lambda z, w: first_layer(z, w, slope, eps=EPS), [x.requires_grad_() for x in (z, weight)], atol=1e-6
    )


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_perceive_wide_is_perceive_of_the_features(backend):
    q, k, weight, slope, beta, w, log_decay, state = wide_inputs(2, 70, 2, 8, 16, 3, 4)
    found = perceive_wide(
        q, k, weight, slope, beta, w, log_decay, state, eps=EPS, return_residual=True, backend=backend
    )
    phi_q, phi_k = (naive_first_layer(z, weight, slope) for z in (q, k))
    all_close(found, naive_perceive(phi_q, phi_k, beta[..., None] * phi_k, w, log_decay, state), 1e-8)


# -- the kernels -----------------------------------------------------------------------------------------------------

pytest.importorskip("triton", reason="the kernels are optional")
kernels = pytest.importorskip("llm_mlp.ops.wide.kernels")


def plain(backend):
    return "triton" if backend == "triton" else "chunked"


@pytest.mark.parametrize("sloped", [True, False], ids=["sloped", "slope-1"])
@pytest.mark.parametrize("sizes", [(70, 2, 16, 32), (33, 1, 32, 256)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_first_layer_kernels(dtype, sizes, sloped, poisoned):
    T, G, R, F = sizes
    earned = Earned("phi dz dweight" + (" dslope" if sloped else ""))
    for seed in range(3):
        given = torch.randn((1, T, G, R), generator=torch.Generator().manual_seed(seed)).to(dtype)
        weight, slope = layer(G, R, F, seed)

        def run(backend):
            return lambda z, w, *s: [first_layer(z, w, s[0] if s else None, eps=EPS, backend=plain(backend))]

        earned.add(run, [given, weight.to(dtype), *([slope.float()] if sloped else [])])
    earned.check()


def run_wide(backend, cu=None, sloped=True):
    def run(q, k, weight, *rest):
        slope, rest = (rest[0], rest[1:]) if sloped else (None, rest)
        return perceive_wide(q, k, weight, slope, *rest, eps=EPS, cu_seqlens=cu, return_residual=True, backend=backend)

    return run


@pytest.mark.parametrize("case", ["whole", "packed", "slope-1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_perceive_wide_kernels(dtype, case, poisoned):
    cu = torch.tensor([0, 0, 3, 66, 90]) if case == "packed" else None
    sloped = case != "slope-1"
    earned = Earned(f"y state residual dq dk dweight {'dslope ' if sloped else ''}dbeta dw dlog_decay dstate")
    for seed in range(2):
        B, T, N = (2, 70, 2) if cu is None else (1, 90, 4)
        given = wide_inputs(B, T, 1, 16, 32, 2, 16, decay="mixed", seed=seed, dtype=dtype, N=N)
        earned.add(lambda backend: run_wide(backend, cu, sloped), [x for i, x in enumerate(given) if sloped or i != 3])
    earned.check()


def test_what_is_kept_for_the_backward_pass_is_not_wide():
    q, k, weight, *rest = wide_inputs(1, 256, 1, 16, 128, 1, 16, dtype=torch.bfloat16)
    given = [x.to(DEVICE).requires_grad_() for x in (q, k, weight, *rest)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(tuple(x.shape)) or x, lambda x: x):
        run_wide("triton")(*given)
    tokens = [shape for shape in saved if 256 in shape]
    assert tokens and all(shape[-1] != 128 for shape in tokens), tokens


def test_compiled_whole_and_bit_equal():
    given = [x.to(DEVICE) for x in wide_inputs(1, 70, 1, 16, 32, 1, 16, dtype=torch.bfloat16)]
    run = run_wide("triton")
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for first, second in zip(with_gradients(compiled, given), with_gradients(run, given), strict=True):
        all_close(first, second, 0.0)
    phi = lambda z, w, s: [first_layer(z, w, s, eps=EPS, backend="triton")]  # noqa: E731
    compiled = torch.compile(phi, backend="aot_eager", fullgraph=True)
    for first, second in zip(with_gradients(compiled, given[1:4]), with_gradients(phi, given[1:4]), strict=True):
        all_close(first, second, 0.0)


def test_nothing_to_read():
    given = [x.to(DEVICE) for x in wide_inputs(2, 0, 1, 16, 32, 1, 16, dtype=torch.bfloat16)]
    y, state, residual = run_wide("triton")(*given)
    assert y.shape == (2, 0, 1, 1, 16) and residual.shape == (2, 0, 1, 1)
    assert torch.equal(state, given[-1])


def test_bad_shapes_are_named():
    q, k, weight, slope, beta, w, log_decay, state = wide_inputs(1, 9, 2, 16, 32, 1, 16, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"perceive_wide: weight has shape \(1, 16, 32\)"):
        perceive_wide(q, k, weight[:1], slope, beta, w, log_decay, state, eps=EPS)
    with pytest.raises(ValueError, match=r"perceive_wide: k has shape"):
        perceive_wide(q, k[:, 1:], weight, slope, beta, w, log_decay, state, eps=EPS)
    with pytest.raises(ValueError, match=r"perceive_wide: state has shape"):
        given = (x.to(DEVICE) for x in (q, k, weight, slope, beta, w, log_decay, state[:, :1]))
        perceive_wide(*given, eps=EPS, backend="triton")
    with pytest.raises(ValueError, match=r"first_layer: slope has shape"):
        first_layer(q, weight, slope[:, 1:], eps=EPS)
    with pytest.raises(ValueError, match=r"expected reads or keys \[..., G, R\]"):
        first_layer(q, weight[0], slope, eps=EPS)
    with pytest.raises(ValueError, match=r"does not serve F = 48"):
        first_layer(q.to(DEVICE), torch.zeros(2, 16, 48), None, eps=EPS, backend="triton")
