"""The causal convolution = torch's with padding on the left; tails carry it over any boundary."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from op_cases import all_close, close, sequences, with_gradients

from llm_mlp.ops.conv import causal_conv, causal_conv_step

C = 5


def inputs(B: int, T: int, K: int, N: int | None = None, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    shapes = (B, T, C), (C, K), (N or B, K - 1, C)
    return [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]


def plain(x, weight, tail):
    """conv1d over (tail, x), and the last K-1 of them."""
    long = torch.cat([tail, x], 1)
    K = weight.shape[1]
    if x.shape[1] == 0:
        return x, tail
    return F.conv1d(long.mT, weight[:, None], groups=C).mT, long[:, long.shape[1] - K + 1 :]


@pytest.mark.parametrize("K", [1, 2, 4, 8])
@pytest.mark.parametrize("T", [0, 1, 2, 3, 4, 20])
def test_is_conv1d(K, T):
    x, weight, tail = inputs(2, T, K)
    for a, b in zip(
        with_gradients(causal_conv, [x, weight, tail]), with_gradients(plain, [x, weight, tail]), strict=True
    ):
        all_close(a, b, 1e-12)
    y, _ = causal_conv(x, weight)
    if T:
        close(y, F.conv1d(F.pad(x.mT, (K - 1, 0)), weight[:, None], groups=C).mT, 1e-12)


@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("bounds", [[0, 0, 1, 3, 3, 9, 20, 20], [0, 20], [0, 2, 4], [0, 0], [0]])
@pytest.mark.parametrize("carried", [False, True])
def test_packed_is_separate(K, bounds, carried):
    N = len(bounds) - 1
    x, weight, tail = inputs(1, bounds[-1], K, N)
    if N == 0:
        tail = tail[:0]

    def separate(x, weight, tail=None):
        tail = x.new_zeros(N, K - 1, C) if tail is None else tail
        parts = [plain(x[:, a:b], weight, tail[n : n + 1]) for n, (a, b) in enumerate(sequences(bounds))]
        return (torch.cat([y for y, _ in parts], 1), torch.cat([t for _, t in parts])) if parts else (x, tail)

    def packed(x, weight, tail=None):
        return causal_conv(x, weight, tail, cu_seqlens=torch.tensor(bounds))

    own = [x, weight, tail] if carried else [x, weight]
    for a, b in zip(with_gradients(packed, own), with_gradients(separate, own), strict=True):
        all_close(a, b, 1e-12)


@pytest.mark.parametrize("at", [0, 1, 2, 3, 9, 10])
def test_split_anywhere_is_whole(at):
    x, weight, tail = inputs(2, 10, 4)
    y1, middle = causal_conv(x[:, :at], weight, tail)
    y2, last = causal_conv(x[:, at:], weight, middle)
    all_close([torch.cat([y1, y2], 1), last], causal_conv(x, weight, tail), 1e-12)


@pytest.mark.parametrize("K", [1, 2, 4])
def test_steps_are_the_whole(K):
    x, weight, tail = inputs(3, 10, K)
    y, last = causal_conv(x, weight, tail)
    own = tail.clone()
    for t in range(10):
        close(causal_conv_step(x[:, t], weight, own), y[:, t], 1e-12)
    close(own, last, 1e-12)
    pool = torch.randn(5, K - 1, C, dtype=torch.float64)
    pool[[3, 0]] = tail[:2]
    before = pool.clone()
    for t in range(10):
        got = causal_conv_step(x[:, t], weight, pool, torch.tensor([3, 0, -1]))
        close(got[:2], y[:2, t], 1e-12)
        assert not got[2].any()
    close(pool[[3, 0]], last[:2], 1e-12)
    assert torch.equal(pool[[1, 2, 4]], before[[1, 2, 4]])


def test_bad_input():
    x, weight, tail = inputs(2, 5, 4)
    with pytest.raises(ValueError, match=r"causal_conv: weight has shape \(4, 4\), expected \(5, 4\)"):
        causal_conv(x, weight[:4])
    with pytest.raises(ValueError, match=r"causal_conv: tail has shape .*, expected \(2, 3, 5\)"):
        causal_conv(x, weight, tail[:1])
    with pytest.raises(ValueError, match="batch must be 1"):
        causal_conv(x, weight, cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="decreases"):
        causal_conv(x[:1], weight, cu_seqlens=torch.tensor([0, 4, 3, 5]))
