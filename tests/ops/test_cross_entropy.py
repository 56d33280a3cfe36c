"""Head and loss in slices = torch's cross-entropy of the full logits, in value and gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from op_cases import DEVICE, Earned, close

from llm_mlp.ops import linear_cross_entropy

D, VOCABULARY = 6, 11


def inputs(*shape: int, dtype=torch.float64, ignored: float = 0.3, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn((*shape, D), generator=g, dtype=torch.float64).to(dtype)
    weight = torch.randn((VOCABULARY, D), generator=g, dtype=torch.float64).to(dtype)
    targets = torch.randint(0, VOCABULARY, shape, generator=g)
    targets[torch.rand(shape, generator=g) < ignored] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def plain(hidden, weight, targets, cap: float, reduction: str, ignore_index: int = -100):
    logits = hidden @ weight.T
    if cap:
        logits = cap * torch.tanh(logits / cap)
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction=reduction, ignore_index=ignore_index)


@pytest.fixture(params=[1, 4 * VOCABULARY, 2**20], ids=["one-token", "four-tokens", "one-slice"])
def slices(request, monkeypatch):
    """How many numbers a slice of the logits has."""
    monkeypatch.setitem(linear_cross_entropy.__globals__["_SLICE_NUMBERS"], "cpu", request.param)


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("cap", [0.0, 1.5, 30.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(2, 9), (5,), (2, 3, 4), (1, 1)])
def test_value_and_gradients(cap, reduction, shape):
    hidden, weight, targets = inputs(*shape)
    targets.view(-1)[0] = 3  # at least one counts
    loss = linear_cross_entropy(hidden, weight, targets, cap=cap, reduction=reduction)
    want = plain(hidden, weight, targets, cap, reduction)
    close(loss, want, 1e-12)
    for a, b in zip(
        torch.autograd.grad(1.7 * loss, [hidden, weight]),
        torch.autograd.grad(1.7 * want, [hidden, weight]),
        strict=True,
    ):
        close(a, b, 1e-12)


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("cap", [0.0, 1.5])
def test_unreduced(cap):
    hidden, weight, targets = inputs(2, 9)
    loss = linear_cross_entropy(hidden, weight, targets, cap=cap, reduction="none")
    close(loss, plain(hidden, weight, targets, cap, "none").view(2, 9).detach(), 1e-12)
    assert loss.shape == targets.shape and not loss.requires_grad
    assert not loss[targets == -100].any()


def test_all_ignored():
    hidden, weight, targets = inputs(2, 5, ignored=1.1)
    for reduction in ("mean", "sum"):
        loss = linear_cross_entropy(hidden, weight, targets, cap=30.0, reduction=reduction)
        assert loss.item() == 0
        for grad in torch.autograd.grad(loss, [hidden, weight]):
            assert not grad.any()  # and not NaN


def test_no_tokens():
    hidden, weight, targets = inputs(1, 0)
    loss = linear_cross_entropy(hidden, weight, targets)
    assert loss.item() == 0 and not torch.autograd.grad(loss, weight)[0].any()
    assert linear_cross_entropy(hidden, weight, targets, reduction="none").shape == (1, 0)


@pytest.mark.parametrize("ignore", [-1, 3, 10_000])
def test_ignore_index(ignore):
    hidden, weight, targets = inputs(4, 7)
    targets[targets == -100] = ignore
    loss = linear_cross_entropy(hidden, weight, targets, ignore_index=ignore)
    want = plain(hidden, weight, targets, 0, "mean", ignore)
    close(loss, want, 1e-12)
    for a, b in zip(
        torch.autograd.grad(loss, [hidden, weight]), torch.autograd.grad(want, [hidden, weight]), strict=True
    ):
        close(a, b, 1e-12)


def test_only_what_is_asked_for():
    hidden, weight, targets = inputs(3, 4)
    want = torch.autograd.grad(plain(hidden, weight, targets, 0, "mean"), weight)[0]
    close(torch.autograd.grad(linear_cross_entropy(hidden.detach(), weight, targets), weight)[0], want, 1e-12)
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, targets).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype):
    hidden, weight, targets = inputs(8, 16, dtype=dtype)
    loss = linear_cross_entropy(hidden, weight, targets, cap=30.0)
    assert loss.dtype == torch.float32
    exact = [hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()]
    want = plain(*exact, targets, 30.0, "mean")
    limit = 1e-6 if dtype == torch.float32 else 0.01
    assert abs(loss.item() - want.item()) < limit * want.item()
    for a, b in zip(torch.autograd.grad(loss, [hidden, weight]), torch.autograd.grad(want, exact), strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).abs().max() < limit * b.abs().max()
    for shape in ((8, 16), (0,)):
        hidden, weight, targets = inputs(*shape, dtype=dtype)
        assert linear_cross_entropy(hidden, weight, targets, reduction="none").dtype == torch.float32


def test_autocast():
    """Under autocast the product runs in bfloat16 and the loss in float32, as torch's own would."""
    hidden, weight, targets = inputs(8, 16, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets)
    want = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets)
    assert loss.dtype == torch.float32 and torch.equal(loss, want)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(loss, [hidden, weight]))


def test_gradcheck():
    hidden, weight, targets = inputs(2, 3)
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, targets, cap=2.0), [hidden, weight])


def test_second_derivatives_are_refused_or_right():
    hidden, weight, targets = inputs(2, 3)
    (grad,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), hidden, create_graph=True)
    (want,) = torch.autograd.grad(plain(hidden, weight, targets, 0, "mean"), hidden, create_graph=True)
    second = torch.autograd.grad(want.square().sum(), hidden)[0]
    try:
        got = torch.autograd.grad(grad.square().sum(), hidden)[0]
    except RuntimeError:
        return
    close(got, second, 1e-12)


def test_bad_input():
    hidden, weight, targets = inputs(2, 3)
    with pytest.raises(ValueError, match="unknown reduction 'median'; known: mean, sum, none"):
        linear_cross_entropy(hidden, weight, targets, reduction="median")


@pytest.mark.parametrize("cap", [0.0, 15.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_kernel(cap, dtype):
    """Within twice the error of plain torch, beside float64 on the rounded inputs (docs/extending.md)."""
    pytest.importorskip("triton", reason="the kernels are optional")
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(70, 32, generator=g).to(dtype), torch.randn(4999, 32, generator=g).to(dtype)
    targets = torch.randint(4999, (70,), generator=g)
    targets[::5] = -100
    earned = Earned("loss dhidden dweight")

    def of(backend):
        kind = "triton" if backend == "triton" else "chunked"
        return lambda h, w: [linear_cross_entropy(h, w, targets.to(h.device), cap=cap, backend=kind)]

    for _ in range(2):
        earned.add(of, [hidden, weight])
    earned.check()
    on = [x.to(DEVICE) for x in (hidden, weight, targets)]
    each, want = (linear_cross_entropy(*on, cap=cap, reduction="none", backend=b) for b in ("triton", "chunked"))
    assert torch.equal(each.cpu() == 0, targets == -100)
    assert (each - want).abs().max() < 2e-5


def test_a_target_outside_the_vocabulary_is_not_silent():
    pytest.importorskip("triton", reason="the kernels are optional")
    hidden, weight = torch.randn(2, 16, device=DEVICE), torch.randn(20, 16, device=DEVICE)
    targets = torch.tensor([3, 20], device=DEVICE)
    assert linear_cross_entropy(hidden, weight, targets, reduction="sum", backend="triton").isnan()
