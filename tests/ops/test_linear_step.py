"""`linear_step` and `gates_step`: what they compute, in plain torch and as kernels, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from op_cases import DEVICE, close

from llm_mlp.ops.heads import gates, gates_step, rms_norm
from llm_mlp.ops.linear_step import ROWS, Product, linear, linear_step
from llm_mlp.ops.linear_step.quantized import Int4, Int8

EPS = 1e-6


def normal(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype).to(DEVICE)


def matrices(*sizes, dtype=torch.float64):
    return [
        Product(normal(N, K, dtype=dtype, seed=n), normal(N, dtype=dtype, seed=9 + n) if n % 2 else None, begin)
        for n, (N, K, begin) in enumerate(sizes)
    ]


@pytest.mark.parametrize("B", [1, 5])
def test_it_is_norm_product_activation_and_sum(B):
    x = normal(B, 24)
    a, b = linear_step(x, matrices((7, 24, 0), (300, 24, 0)), eps=EPS, relu2=True)
    (first, _, _), (second, bias, _) = matrices((7, 24, 0), (300, 24, 0))
    z = rms_norm(x, EPS)
    close(a, (z @ first.T).relu() ** 2, 1e-12)
    close(b, (z @ second.T + bias).relu() ** 2, 1e-12)
    residual = normal(B, 7, seed=5)
    close(linear_step(x, matrices((7, 8, 3)), residual=residual)[0], residual + x[:, 3:11] @ first_of(7, 8).T, 1e-12)


def first_of(N, K):
    return matrices((N, K, 0))[0].weight


@pytest.mark.parametrize("B", [1, 2, ROWS])
@pytest.mark.parametrize(
    ("sizes", "how"),
    [
        ([(40, 96, 0), (33, 96, 0)], {"eps": EPS}),
        ([(70, 144, 0)], {"eps": EPS, "relu2": True}),
        ([(35, 160, 0)], {"residual": True}),
        ([(40, 16, 32), (2, 16, 0), (24, 16, 16)], {}),
    ],
)
def test_kernel(B, sizes, how):
    pytest.importorskip("triton", reason="the kernels are optional")
    dtype = torch.bfloat16
    width = max(K + begin for _, K, begin in sizes)
    x = normal(B, width + 16, dtype=dtype)[:, 16:]  # a slice of a wider tensor
    residual = normal(B, sizes[0][0], dtype=dtype, seed=3) if how.get("residual") else None
    how = {**how, "residual": residual}
    got = linear_step(x, matrices(*sizes, dtype=dtype), **how, backend="triton")
    wide = [Product(w.double(), None if b is None else b.double(), n) for w, b, n in matrices(*sizes, dtype=dtype)]
    how["residual"] = None if residual is None else residual.double()
    for y, want in zip(got, linear_step(x.double(), wide, **how), strict=True):
        assert y.dtype == dtype
        close(y.double(), want, 2**-8 * float(want.abs().max()))


@pytest.mark.parametrize("B", [1, 3, ROWS])
@pytest.mark.parametrize(
    ("sizes", "how"),
    [
        ([(40, 96, 0), (33, 96, 0)], {"eps": EPS, "relu2": True}),
        ([(35, 160, 0)], {}),
        ([(40, 16, 32), (24, 16, 16)], {}),
    ],
)
def test_kernel_of_int8(B, sizes, how):
    pytest.importorskip("triton", reason="the kernels are optional")
    x = normal(B, max(K + begin for _, K, begin in sizes), dtype=torch.bfloat16)
    products = matrices(*sizes, dtype=torch.bfloat16)
    products[0] = products[0]._replace(weight=Int8.of(products[0].weight))  # beside one that stays
    got = linear_step(x, products, **how, backend="triton")
    wide = [p.weight.dequantize(torch.float64) if isinstance(p.weight, Int8) else p.weight.double() for p in products]
    exact = [
        Product(w, None if p.bias is None else p.bias.double(), p.begin) for w, p in zip(wide, products, strict=True)
    ]
    for y, want in zip(got, linear_step(x.double(), exact, **how), strict=True):
        close(y.double(), want, 2**-8 * float(want.abs().max()))


def test_int8_is_the_nearest():
    weight = normal(40, 96).cpu() * torch.logspace(-6, 3, 40)[:, None]
    weight[7] = 0
    found = Int8.of(weight)
    assert found.numbers.abs().max() <= 127 and not found.dequantize(torch.float64)[7].any()
    # Half a step, and where the scale was rounded down the largest number is cut by 2^-9 of it.
    step = found.scale.double()[:, None]
    assert ((found.dequantize(torch.float64) - weight).abs() <= 0.5 * step + 2**-8 * weight.abs()).all()


@pytest.mark.parametrize("group", [32, 64, 128])
def test_int4_is_the_nearest(group):
    weight = normal(32, 3 * group).cpu()
    found = Int4.of(weight)
    assert found.group == group and found.packed.numel() * found.packed.element_size() == weight.numel() // 2
    parts = weight.view(32, 3, group)
    step = (parts.amax(-1) - parts.amin(-1)) / 15
    error = (found.dequantize(torch.float64) - weight).abs().view_as(parts)
    # Half a step, and what bfloat16 loses of scale and zero.
    assert (error <= 0.52 * step[..., None] + 2**-7 * parts.abs().amax(-1, keepdim=True)).all()
    with pytest.raises(ValueError, match=r"int4: a matrix \(30, 64\); rows in multiples of 16"):
        Int4.of(normal(30, 64))


@pytest.mark.parametrize("kind", [Int8, Int4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("B", [1, 8, 9, 40])
def test_products_of_quantised_matrices(kind, dtype, B):
    matrix, bias = kind.of(normal(48, 160).cpu()), normal(48, seed=1).cpu()
    x = normal(B, 2, 160, seed=2).cpu().to(dtype)
    got = linear(x, matrix, bias.to(dtype))
    want = x.double() @ matrix.dequantize(torch.float64).T + bias.to(dtype).double()
    assert got.shape == (B, 2, 48) and got.dtype == dtype
    # The product, the scale and the sum are each rounded.
    close(got.double(), want, (3 * 2**-8 if dtype == torch.bfloat16 else 1e-6) * float(want.abs().max()))


@pytest.mark.parametrize(("decays", "shares"), [(True, True), (True, False), (False, True)])
def test_gates_kernel(decays, shares):
    pytest.importorskip("triton", reason="the kernels are optional")
    B, G, m, E = 3, 2, 3, 5
    heads = 9 * normal(B, 2 * G * m)[:, : G * m * (decays + shares)].float()
    rate, erase = normal(G * m).float() if decays else None, 5 * normal(B, E + 3)[:, 3:].float()
    how = {"shape": (G, m), "erase_max": 1.98}
    got = gates_step(heads, heads, rate, erase, **how, backend="triton")
    want = gates(heads.double(), heads.double(), None if rate is None else rate.double(), erase.double(), **how)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == torch.float32 and a.is_contiguous()
            close(a.double(), b, 1e-6 * max(1, float(b.abs().max())))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": normal(2, 3, 4)}, r"x \(2, 3, 4\) must be \[B, D\]"),
        ({"products": []}, "products 1 to 3, got 0"),
        ({"products": matrices((4, 20, 0))}, r"matrix 0 \(4, 20\) from column 0 does not fit x \[B, 16\]"),
        ({"products": matrices((4, 8, 0)), "eps": EPS}, "takes 8 of x's 16 columns; a norm is of all"),
        ({"products": [Product(normal(4, 16), normal(3))]}, r"bias 0 has shape \(3,\), expected \(4,\)"),
        ({"residual": normal(2, 5)}, r"residual has shape \(2, 5\), expected \(2, 4\)"),
        ({"products": matrices((4, 16, 0), (4, 16, 0)), "residual": normal(2, 4)}, "added to one product"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    given = {"x": normal(2, 16), "products": matrices((4, 16, 0)), **change}
    with pytest.raises(ValueError, match=message):
        linear_step(given.pop("x"), given.pop("products"), **given)


def test_many_sequences_are_not_served():
    pytest.importorskip("triton", reason="the kernels are optional")
    x = normal(ROWS + 1, 16, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="does not serve more than 16 sequences"):
        linear_step(x, matrices((4, 16, 0), dtype=torch.bfloat16), backend="triton")
