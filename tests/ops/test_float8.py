"""float8 products against float64: rounding as e4m3 says, gradients too, nothing lost to autocast or a large row."""

from __future__ import annotations

import pytest
import torch

from llm_mlp.ops.float8 import LARGEST, linear_float8, quantise

# The largest relative rounding error of e4m3 is 2^-4; spread evenly below it, its root mean square is 2^-4 / sqrt(3).
# Both factors of a sum of products of random sign are rounded, and what comes out once more, to bfloat16.
BOUND = 2**-4 * (2 / 3) ** 0.5 + 2**-9


def data(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(got, want):
    return float((got.detach().double() - want).norm() / want.norm())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rows_are_rounded_as_e4m3_says(dtype):
    t = (data(40, 96) * torch.logspace(-20, 20, 40, dtype=torch.float64)[:, None]).to(dtype)
    q, scale = quantise(t)
    assert q.dtype == torch.float8_e4m3fn and q.is_contiguous() and scale.shape == (40, 1)
    assert (q.float().abs().amax(-1) == LARGEST).all()
    off, t = (q.double() * scale.double() - t.double()).abs(), t.double()
    # Relative, or to half of the smallest step (2^-9 of a scale); scales are float32.
    assert (off <= torch.maximum(2**-4 * t.abs(), 2**-10 * scale.double()) * (1 + 1e-6)).all()


def test_odd_rows():
    t = torch.zeros(4, 32)
    t[1], t[2, 3], t[3, 3] = 1e-38, torch.nan, torch.inf
    q, scale = quantise(t)
    numbers = q.float() * scale
    assert numbers[:2].isfinite().all() and not numbers[0].any()
    assert numbers[2].isnan().all() and numbers[3].isnan().any()  # the guard sees it in the loss


def test_a_transposed_matrix_is_laid_out_anew():
    t = data(32, 48).float()
    for a, b in zip(quantise(t.t()), quantise(t.t().contiguous()), strict=True):
        assert a.is_contiguous() and torch.equal(a.float(), b.float())


@pytest.mark.parametrize("autocast", [False, True])
def test_the_three_products(autocast):
    """Forward and the gradient of x to float8's rounding, the gradient of W to bfloat16's."""
    x, w, g = data(3, 70, 96), data(64, 96, seed=1), data(3, 70, 64, seed=2)
    x, g = (t.bfloat16().double() for t in (x, g))  # as they come in
    ins = x.float().requires_grad_(), w.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = linear_float8(*ins)
    assert y.dtype == torch.bfloat16 and y.shape == (3, 70, 64)
    dx, dw = torch.autograd.grad(y, ins, g.bfloat16())
    assert dx.dtype == dw.dtype == torch.float32
    assert error(y, x @ w.T) < BOUND and error(dx, g @ w) < BOUND
    assert error(dw, g.flatten(0, 1).T @ x.flatten(0, 1)) < 2**-8
    # What is computed is the product of the rounded factors, exactly but for the last rounding.
    (a, s), (b, r) = quantise(x.flatten(0, 1)), quantise(w)
    want = (a.double() * s.double()) @ (b.double() * r.double()).T
    assert error(y.flatten(0, 1), want) < 2**-8


def test_a_large_row_takes_nothing_from_the_others():
    x, w = data(64, 96), data(64, 96, seed=1)
    x[0] *= 1e6
    y = linear_float8(x.float(), w.float())
    assert error(y[1:], x[1:] @ w.T) < BOUND


def test_sides_that_are_no_multiples_of_16():
    for shape in ((40, 32), (32, 40)):
        with pytest.raises(ValueError, match="must be multiples of 16"):
            linear_float8(torch.ones(2, shape[1]), torch.ones(shape))
