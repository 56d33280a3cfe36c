"""`perception_step` as three Triton kernels, made of the parts of the single steps' kernels.

- ``_inputs_step``  (sequence, R channels), of `llm_mlp.ops.heads.kernels`: with the write gate's second product
- ``_states``       (sequence, group, part): some heads' fast weights, or a part of the memorised rows
- ``_finish``       (sequence, group): the sum of both, normed and gated; the token's score is kept, full blocks closed
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llm_mlp.ops.heads.kernels import _inputs_step, _sigmoid, gate_logits, gate_rows
from llm_mlp.ops.memorise.step_kernels import added, close, look, parts_of
from llm_mlp.ops.memorise.units import raw
from llm_mlp.ops.perceive.step_kernels import place_of, tile_of, update
from llm_mlp.ops.perception_step import Layer, State, _sizes
from llm_mlp.ops.tiles import after_previous, narrow
from llm_mlp.ops.tune import Table, overlap, plan

LAUNCH: Table = {
    "_inputs_step": {"num_warps": 4},
    "_states": {"columns": 64, "BK": 32, "num_warps": 4},
    "_finish": {"num_warps": 4},
}


@triton.jit(do_not_specialize=["G"])
def _states(
    q_ptr, k_ptr, w_ptr, read_ptr, key_ptr, low_ptr, up_ptr, bias_ptr, logit_ptr, rate_ptr, sink_ptr,
    state_ptr, keys_ptr, values_ptr, kept_ptr, length_ptr, index_ptr, y_ptr, residual_ptr, filled_ptr, part_ptr,
    low_stride, logit_stride, G, scale, erase_max,
    m: tl.constexpr, V: tl.constexpr, R: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr, HEADS: tl.constexpr,
    RANK: tl.constexpr, BW: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr, BK: tl.constexpr,
    SOFTMAX: tl.constexpr, PARTS: tl.constexpr, INDEXED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """HEADS programs of a group update its heads, PARTS read its rows."""
    b, g, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    group = g + tl.arange(0, 1)
    up = gate_rows(group, group < G, up_ptr, RANK)
    after_previous(PDL)
    row = place_of(index_ptr, b, INDEXED)
    if part < HEADS:
        logit = gate_logits(up, group, group < G, low_ptr + b * low_stride, bias_ptr, RANK)
        beta = erase_max * _sigmoid(tl.sum(logit, 0))
        update(
            b, g, part, row, q_ptr, k_ptr, None, w_ptr, logit_ptr + b * logit_stride, rate_ptr, beta, state_ptr, y_ptr,
            residual_ptr, G, m, V, R, BM, BV, True, True,
        )  # fmt: skip
    else:
        look(
            b, g, part - HEADS, row, read_ptr, key_ptr, w_ptr, None, sink_ptr, keys_ptr, values_ptr, kept_ptr,
            length_ptr, y_ptr, filled_ptr, part_ptr, G, m * V, scale,
            R, BW, BLOCK, SLOTS, BK, 0, 1, SOFTMAX, PARTS, False,
        )  # fmt: skip


@triton.jit(do_not_specialize=["G"])
def _finish(
    y_ptr, residual_ptr, filled_ptr, part_ptr, logit_ptr, low_ptr, up_ptr, bias_ptr, out_ptr,
    keys_ptr, values_ptr, kept_ptr, length_ptr, index_ptr, low_stride, logit_stride, G, eps,
    m: tl.constexpr, V: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, BW: tl.constexpr, BLOCK: tl.constexpr,
    SLOTS: tl.constexpr, J: tl.constexpr, BS: tl.constexpr, PARTS: tl.constexpr, INDEXED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    b, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at, d = b * G + g, tl.arange(0, BW)
    up = gate_rows(g * BW + d, d < BW, up_ptr, RANK)
    after_previous(PDL)
    row = place_of(index_ptr, b, INDEXED)
    if row >= 0:
        y = tl.load(y_ptr + at * BW + d)
        share = _sigmoid(tl.load(logit_ptr + b * logit_stride + (G + g) * m + d // V).to(tl.float32))
        y += share * added(at, part_ptr, BW, PARTS)
        heads = tl.reshape(y, (m, V))
        heads *= tl.rsqrt(tl.sum(heads * heads, 1) / V + eps)[:, None]
        gate = gate_logits(up, g * BW + d, d < BW, low_ptr + b * low_stride, bias_ptr, RANK)
        y = tl.reshape(heads, (BW,)) * _sigmoid(gate)
        tl.store(out_ptr + at * BW + d, narrow(y, out_ptr.dtype.element_ty))
    else:
        tl.store(out_ptr + at * BW + d, tl.zeros((BW,), out_ptr.dtype.element_ty))
    close(
        b, g, row, keys_ptr, values_ptr, kept_ptr, length_ptr, filled_ptr, residual_ptr, G, BW,
        R, BW, BLOCK, SLOTS, J, BS, m, m,
    )  # fmt: skip


def candidates() -> tuple[Table, Table]:
    """Launch tables, the fast one first (see perceive/kernels.py)."""
    safe = {"_inputs_step": {"num_warps": 2}, "_states": {"columns": 32, "BK": 16, "num_warps": 2}}
    return LAUNCH, {**safe, "_finish": {"num_warps": 2}}


@torch.library.custom_op(
    "llm_mlp::perception_step", mutates_args=("tails", "states", "keys", "values", "scores", "length")
)
def _run(
    x: Tensor, logits: Tensor, tails: Tensor, states: Tensor, keys: Tensor, values: Tensor, scores: Tensor,
    length: Tensor, indices: Tensor | None, conv: Tensor, slope: Tensor | None, gain: Tensor, log_rate: Tensor,
    sink: Tensor, gates: list[Tensor], begins: list[int], sizes: list[int], erase_max: float, eps: float,
    softmax: bool, table: int, assembler: str,
) -> Tensor:  # fmt: skip
    from llm_mlp.ops.tune import Plan

    B, (G, m, V, block, slots) = len(x), sizes
    (C, K), R, width = conv.shape, states.shape[2], m * V
    write, write_bias, erase, erase_bias, output, output_bias = gates
    way = Plan(table, assembler)
    launch = way.of(candidates())
    q, k, read, key = (x.new_empty((B, G, R)) for _ in range(4))
    w, out = x.new_empty((B, width * G)), x.new_empty((B, width * G))
    y, residual = (torch.empty((B, G, n), dtype=torch.float32, device=x.device) for n in (width, m))
    filled = torch.empty((B, G), dtype=torch.int32, device=x.device)
    parts = parts_of(B * G, x.is_cuda)
    partial = y.new_empty((B, G, parts, width + 2))
    common = {"RANK": write.shape[1], "INDEXED": indices is not None, **overlap(x, B)}
    form = {"m": m, "V": V, "R": R, "BW": width, "BLOCK": block, "SLOTS": slots, "PARTS": parts, **common}
    how = dict(launch["_states"])
    tile = tile_of(B, G, R, m, V, how.pop("columns"))
    with way.compiling():
        _inputs_step[(B, triton.cdiv(C, R))](
            x, tails, conv, slope, write, write_bias, gain, indices, q, k, w, read, key, x.stride(0), begins[0], G, C,
            G * width, eps, R=R, K=K, SLOPE=slope is not None, WRITE=True, UNITS=True, UNIT=True, **common,
            **launch["_inputs_step"],
        )  # fmt: skip
        _states[(B, G, tile.parts + parts)](
            q, k, w, read, key, x[:, begins[1] :], erase, erase_bias, logits, log_rate, sink, states, keys, values,
            scores, length, indices, y, residual, filled, partial, x.stride(0), logits.stride(0), G, R**-0.5,
            erase_max, BM=tile.BM, BV=tile.BV, HEADS=tile.parts, SOFTMAX=softmax, **form, **how,
        )  # fmt: skip
        _finish[(B, G)](
            y, residual, filled, partial, logits, x[:, begins[2] :], output, output_bias, out, raw(keys), raw(values),
            scores, length, indices, x.stride(0), logits.stride(0), G, eps, J=triton.next_power_of_2(slots + block),
            BS=16, **form, **launch["_finish"],
        )  # fmt: skip
    return out


@_run.register_fake
def _(x, logits, tails, states, keys, values, scores, length, indices, conv, slope, gain, log_rate, sink, gates, *_):
    return x.new_empty((len(x), gates[0].shape[0]))


def run(projected: Tensor, logits: Tensor, layer: Layer, state: State, indices: Tensor | None) -> Tensor:
    """As `llm_mlp.ops.perception_step.perception_step` on what is served."""
    projected, logits = (x if x.stride(-1) == 1 else x.contiguous() for x in (projected, logits))
    way = plan("perception_step", _sizes(projected, layer, state))
    gates = (layer.write, layer.erase, layer.output)
    return _run(
        projected, logits, state.tails, state.fast_weights, *state.units, indices, layer.conv, layer.slope, layer.gain,
        layer.log_rate, layer.sink, [t for g in gates for t in (g.weight, g.bias)], [g.begin for g in gates],
        [layer.groups, *layer.heads, layer.block, layer.slots], layer.erase_max, layer.eps,
        layer.activation == "softmax", way.table, way.assembler,
    )  # fmt: skip
