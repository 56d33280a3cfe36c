"""What a model's matrices are held in: a float dtype, or 8 or 4 bits with activations in bfloat16.

Quantised are the matrices with both sides of at least `SMALL` (the projections, the FFN, the head): the bytes that a
decoding step reads. Embeddings, which are looked up a row at a time (a tied head is one), scalars a head, low-rank
gates, convolutions and norms stay. The head is int8 at the least, for a rank of tokens tells differences that 4 bits
blur.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llm_mlp.models.lm import LM
from llm_mlp.models.mixer import Linear
from llm_mlp.ops.linear_step import ROWS, Product, linear, linear_step
from llm_mlp.ops.linear_step.quantized import Int4, Int8
from llm_mlp.precision import DTYPES

log = logging.getLogger("llm_mlp.weights")

FLOATS = {"fp32": torch.float32, **DTYPES}
WEIGHTS = (*FLOATS, "int8", "int4")
SMALL = 128
COMPARED = (1, ROWS, 2 * ROWS)  # one sequence, the most that the kernel serves, and more than that


class QuantizedLinear(nn.Module):
    """A `Linear` whose matrix is an `Int8` or `Int4`; not trained, not saved."""

    def __init__(self, matrix: Int8 | Int4, bias: Tensor | None) -> None:
        super().__init__()
        self.kind = type(matrix)
        self.fixed: dict[str, Any] = {}
        for name, value in vars(matrix).items():
            if isinstance(value, Tensor):
                self.register_buffer(name, value)
            else:
                self.fixed[name] = value
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def matrix(self) -> Int8 | Int4:
        parts: dict[str, Any] = {**dict(self.named_buffers(recurse=False)), **self.fixed}
        return self.kind(**parts)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., K]`` -> ``[..., N]``."""
        return linear(x, self.matrix, self.bias)

    def product(self, begin: int = 0) -> Product:
        """As `linear_step` takes it."""
        return Product(self.matrix, self.bias, begin)


def activations(weights: str) -> torch.dtype:
    """What a model computes in whose weights are held so."""
    return FLOATS.get(weights, torch.bfloat16)


@torch.no_grad()
def hold(model: LM, weights: str) -> LM:
    """Holds the weights of ``model`` in one of `WEIGHTS` from now on, where they are (in place); returns it.

    Quantising is rounding to the nearest, no data is looked at. Logs what became of the matrices, and where the
    product with the largest takes longer than in bfloat16: of as many sequences as `COMPARED`.

    Raises:
        ValueError: an unknown name, or a model that is quantised already.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights {weights!r}: expected {', '.join(WEIGHTS)}")
    if model.quantization != "none":
        raise ValueError(f"weights {weights}: the model's are {model.quantization}; load it again")
    model = model.to(activations(weights))
    if weights in FLOATS:
        return model
    before, counts = weight_bytes(model), {Int8: 0, Int4: 0}
    largest: tuple[Tensor, Int8 | Int4] | None = None
    for path, module in list(model.named_modules()):
        if not isinstance(module, Linear) or min(module.weight.shape) < SMALL:
            continue
        four = weights == "int4" and module is not model.head and Int4.serves(module.weight)
        matrix = Int4.of(module.weight) if four else Int8.of(module.weight)
        counts[type(matrix)] += 1
        if module is not model.head and (largest is None or module.weight.numel() > largest[0].numel()):
            largest = module.weight, matrix
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, QuantizedLinear(matrix, module.bias))
    model.quantization = weights
    log.info(
        "%s weights: %d matrices in 8 bits, %d in 4, %.1f MB of %.1f in bf16; smaller ones than %d x %d stay",
        weights, counts[Int8], counts[Int4], weight_bytes(model) / 1e6, before / 1e6, SMALL, SMALL,
    )  # fmt: skip
    if largest is not None:
        _compare(weights, *largest)
    return model


def _compare(weights: str, plain: Tensor, matrix: Int8 | Int4) -> None:
    """Log where products are slower than in bfloat16."""
    for rows in COMPARED:
        _compare_rows(weights, plain, matrix, rows)


def _compare_rows(weights: str, plain: Tensor, matrix: Int8 | Int4, rows: int) -> None:
    x = torch.ones((rows, plain.shape[1]), dtype=torch.bfloat16, device=plain.device)
    quick, own = (_seconds(lambda m=m: linear_step(x, [Product(m)]), x.device) for m in (plain, matrix))  # type: ignore[misc]
    if own > quick:
        log.warning(
            "%s weights save bytes, not time, in products of %d rows: with a matrix %s one takes %.0f us, %.0f in bf16",
            weights, rows, tuple(plain.shape), 1e6 * own, 1e6 * quick,
        )  # fmt: skip


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    """The least of some calls; the first (a kernel's compilation, its check) do not count."""
    found = []
    for n in range(13):
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if n >= 3:
            found.append(time.perf_counter() - began)
    return min(found)


def exact_copy(model: LM) -> LM:
    """In float64, quantised matrices by what they stand for, the state kept in full: for comparing with."""
    found = copy.deepcopy(model).keep_state("auto")
    for path, module in list(found.named_modules()):
        if isinstance(module, QuantizedLinear):
            weight = module.matrix.dequantize(torch.float64)
            linear_ = Linear(weight.shape[1], weight.shape[0], bias=module.bias is not None, device="meta")
            linear_.weight, linear_.bias = nn.Parameter(weight), module.bias  # type: ignore[assignment]
            parent, _, name = path.rpartition(".")
            setattr(found.get_submodule(parent), name, linear_)
    found.quantization = "none"
    return found.double()


def weight_bytes(model: LM) -> int:
    """Of all parameters and of what quantised matrices are kept in."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
