"""Matrices kept in 8 or 4 bits, and products with them; x stays as it is ("weight-only")."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

FEW = 8  # rows of x up to which torch's int8 kernel beats its bf16 products on a CPU (it has no blocks of rows)
GROUPS = (128, 64, 32)  # numbers of a row that share a scale in 4 bits: the first that divides the row


@dataclass(frozen=True)
class Int8:
    """``numbers [N, K]`` (int8) times ``scale [N]`` (bfloat16): a symmetric scale for each row."""

    numbers: Tensor
    scale: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Int8:
        """The nearest to ``weight [N, K]``."""
        wide = weight.detach().float()
        # Numbers are chosen for the scale as it is kept, so rounding that adds nothing to the error.
        scale = (wide.abs().amax(1).clamp(min=1e-30) / 127).to(torch.bfloat16)
        numbers = (wide / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
        return cls(numbers, scale)

    @property
    def shape(self) -> torch.Size:
        return self.numbers.shape

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """``[N, K]``."""
        wide = torch.promote_types(dtype, torch.float32)
        return (self.numbers.to(wide) * self.scale.to(wide)[:, None]).to(dtype)

    def times(self, x: Tensor) -> Tensor:
        """``x W^T``: ``[..., K]`` -> ``[..., N]`` in x's dtype.

        Many rows: the matrix is widened for the product (8 bits are exact in bfloat16) and the scale applied after.
        """
        N, K = self.shape
        if x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.numel() <= FEW * K:
            y = torch._weight_int8pack_mm(x.reshape(-1, K).contiguous(), self.numbers, self.scale.to(x.dtype))
            return y.view(*x.shape[:-1], N)
        if x.dtype == torch.float16:  # sums of 127 x may leave its range
            return F.linear(x, self.dequantize(x.dtype))
        return F.linear(x, self.numbers.to(x.dtype)) * self.scale.to(x.dtype)


@dataclass(frozen=True)
class Int4:
    """``(number - 8) scale + zero``, a scale and a zero for each ``group`` numbers of a row, in the layout that torch's
    own kernel of a device reads.

    ``packed``: that layout. ``scales``: bfloat16 ``[K / group, N, 2]``.
    """

    packed: Tensor
    scales: Tensor
    group: int
    shape: torch.Size
    device: str  # "cpu" or "cuda": whose layout it is

    @staticmethod
    def serves(weight: Tensor) -> bool:
        """Whether the kernels take such a matrix."""
        N, K = weight.shape
        return N % 16 == 0 and K % GROUPS[-1] == 0

    @classmethod
    def of(cls, weight: Tensor) -> Int4:
        """The nearest to ``weight [N, K]``, with the largest of `GROUPS` that divides K.

        Raises:
            ValueError: N is no multiple of 16, or K none of 32.
        """
        if not cls.serves(weight):
            raise ValueError(f"int4: a matrix {tuple(weight.shape)}; rows in multiples of 16, columns of 32 are packed")
        N, K = weight.shape
        group = next(g for g in GROUPS if K % g == 0)
        parts = weight.detach().float().view(N, K // group, group)
        low, high = parts.amin(-1), parts.amax(-1)
        scale = ((high - low) / 15).clamp(min=1e-30)
        scales = torch.stack([scale, low + 8 * scale], -1).to(torch.bfloat16)  # numbers are chosen for these
        scale, zero = (x[..., None].float() for x in scales.unbind(-1))
        numbers = ((parts - zero) / scale + 8).round().clamp(0, 15).to(torch.int32).view(N, K)
        if weight.device.type == "cuda":
            pairs = (numbers[:, ::2] << 4 | numbers[:, 1::2]).to(torch.uint8)
            packed = torch._convert_weight_to_int4pack(pairs, min(8, K // 16 & -(K // 16)))
        else:
            packed = torch._convert_weight_to_int4pack_for_cpu(numbers, 1)
        return cls(packed, scales.transpose(0, 1).contiguous(), group, weight.shape, weight.device.type)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """``[N, K]``: the products with unit vectors, so exactly what the kernel multiplies by."""
        kind = torch.bfloat16 if self.device == "cuda" else torch.float32
        unit = torch.eye(self.shape[1], dtype=kind, device=self.packed.device)
        return self.times(unit).T.to(dtype).contiguous()

    def times(self, x: Tensor) -> Tensor:
        """``x W^T``: ``[..., K]`` -> ``[..., N]`` in x's dtype, bfloat16, on a CPU float16 and float32 too.

        Raises:
            ValueError: x on another kind of device than the matrix was packed for.
        """
        if x.device.type != self.device:
            raise ValueError(f"int4: packed for {self.device}, x is on {x.device.type}; quantise it there again")
        N, K = self.shape
        kernel = torch._weight_int4pack_mm if self.device == "cuda" else torch._weight_int4pack_mm_for_cpu
        y = kernel(x.reshape(-1, K).contiguous(), self.packed, self.group, self.scales.to(x.dtype))
        return y.view(*x.shape[:-1], N)


Matrix = Tensor | Int8 | Int4
