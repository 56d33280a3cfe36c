"""The perception mixer: heads whose second layer is written online by the context, and memorised units.

The equations are in docs/model.md; letters in docs/notation.md.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llm_mlp.config import ModelConfig
from llm_mlp.models.mixer import Cost, Linear, Mixer, State, init_linear, linear, vary
from llm_mlp.ops import Units, memorise, memorise_step, perceive, perceive_step, perceive_transition, units_init
from llm_mlp.ops.heads import (
    Gates,
    HeadInputs,
    gates,
    gates_step,
    head_inputs,
    head_inputs_step,
    head_outputs,
)
from llm_mlp.ops.linear_step import linear_step
from llm_mlp.ops.memorise.units import to_rows
from llm_mlp.ops.perceive.chunked import CHUNK
from llm_mlp.ops.perception_step import Gate, Layer, perception_step, serves
from llm_mlp.ops.perception_step import State as Token
from llm_mlp.ops.wide import first_layer, perceive_wide

_UNITS = tuple(f"units.{name}" for name in Units._fields)


class Split(Protocol):
    """What stands in for the state before a text whose earlier part another process reads."""

    def tail(self, x: Tensor, back: int, cu_seqlens: Tensor | None) -> Tensor: ...

    def perceive(
        self, q: Tensor, k: Tensor, e: Tensor, w: Tensor, log_decay: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def units(
        self, k: Tensor, w: Tensor, score: Tensor, block: int, slots: int, cu_seqlens: Tensor | None
    ) -> Units: ...


class PerceptionMixer(Mixer):
    """One layer of perception heads.

    State: ``conv [N, K-1, C]`` (inputs of the convolution), ``fast_weights [N, G, F, m, V]`` and ``units.*``
    (`llm_mlp.ops.Units`), in the dtypes of ``kept``; parts that the config switches off are absent.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        c = config.perception
        self.groups, self.heads_per_group = c.groups, c.heads_per_group
        self.read_width, self.features, self.value_width = c.read_width, c.features, c.value_width
        self.erase, self.erase_max, self.decay = c.erase, c.erase_max, c.decay
        self.block, self.slots, self.read = c.block, c.slots, c.read
        # Given the transition (P, log_a) of every text that is read, where it is set: what composing contexts needs.
        self.observer: Callable[[Tensor, Tensor], None] | None = None
        # Given k, w, log_decay, beta and the residuals of every text that is read, where it is set (`watching`).
        self.watcher: Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor], None] | None = None
        # Where the text is split over processes: what of the past crosses to this one (`llm_mlp.train.context`).
        self.split: Split | None = None
        self.eps, self.layer, self.n_layers, self.half_life = config.norm_eps, layer, config.n_layers, c.half_life
        G, R, V, width = c.groups, c.read_width, c.value_width, c.gate_rank
        D, H = config.d_model, c.heads
        qkv = (G * R, G * R, H * V)
        channels = sum(qkv)
        gates = [kind for kind, on in _gates(config) if on]
        self.gate_names = gates
        rows = (*qkv, *(width for _ in gates))
        self.fused_rows = {"in_proj.weight": rows}
        self.in_split = (channels, *(width for _ in gates))
        self.in_proj = Linear(D, sum(rows), bias=False)
        # Scalars a head: forgetting and the weight of what the memorised units say. Zero at the start.
        self.head_split = (H if c.decay else 0, H if c.block else 0)
        self.head_proj = Linear(D, sum(self.head_split)) if any(self.head_split) else None
        self.conv = nn.Parameter(torch.empty(channels, c.conv_width)) if c.conv_width else None
        self.slope = nn.Parameter(torch.empty(channels)) if c.learned_slope else None
        erase_width = {"scalar": G, "diagonal": G, "free": G * c.features, "none": 0}[c.erase]
        self.erase_up = Linear(width, erase_width) if "erase" in gates else None
        self.erase_diagonal = nn.Parameter(torch.empty(G, c.features)) if c.erase == "diagonal" else None
        self.write_up = Linear(width, H * V) if "write" in gates else None
        self.output_up = Linear(width, H * V) if "output" in gates else None
        self.log_rate = nn.Parameter(torch.empty(H)) if c.decay else None
        self.first_layer = nn.Parameter(torch.empty(G, R, c.features)) if c.wide else None
        self.first_slope = nn.Parameter(torch.empty(G, c.features)) if c.wide and c.learned_slope else None
        self.surprise_gain = nn.Parameter(torch.empty(H)) if c.surprise else None
        if c.block:
            self.units_gain = nn.Parameter(torch.empty(2, R))  # of the memorised units' reads and keys
            self.sink = nn.Parameter(torch.empty(G))
        self.out_proj = Linear(H * V, D, bias=False)

    def init_weights(self) -> None:
        init_linear(self.in_proj.weight)
        nn.init.zeros_(self.out_proj.weight)
        if self.head_proj is not None:
            nn.init.zeros_(self.head_proj.weight)
            nn.init.zeros_(self.head_proj.bias)
            nn.init.constant_(self.head_proj.bias[self.head_split[0] :], -1.0)
        if self.conv is not None:
            nn.init.normal_(self.conv, std=0.1)
            nn.init.ones_(self.conv[:, -1])
        for up, bias in ((self.erase_up, -math.log(3)), (self.write_up, 0.0), (self.output_up, 1.0)):
            if up is not None:
                nn.init.zeros_(up.weight)
                nn.init.constant_(up.bias, bias)
        for ones in (self.slope, self.first_slope):
            if ones is not None:
                nn.init.ones_(ones)
        for zeros in (self.erase_diagonal, self.surprise_gain):
            if zeros is not None:
                nn.init.zeros_(zeros)
        if self.first_layer is not None:
            nn.init.normal_(self.first_layer, std=1.5 / math.sqrt(self.read_width))
        if self.log_rate is not None:
            # The ladder of time scales: half-life 1/rate, log-spaced in each group, longer in deeper layers.
            short, long = self.half_life
            long *= 2 ** (4 * self.layer / self.n_layers)
            ladder = torch.linspace(math.log(short), math.log(long), self.heads_per_group)
            with torch.no_grad():
                self.log_rate.copy_(-ladder.repeat(self.groups))
        if self.block:
            nn.init.ones_(self.units_gain)
            nn.init.zeros_(self.sink)

    # -- the pieces that whole sequences and single tokens share; leading dimensions are [B, T] or [B] ---------

    def _ups(self) -> dict[str, Linear]:
        """The second matrix of each gate that is on."""
        found = (("write", self.write_up), ("erase", self.erase_up), ("output", self.output_up))
        return {name: up for name, up in found if up is not None}

    def _scalars(self, x: Tensor, heads: Tensor | None, erase: Tensor | None, step: bool = False) -> Gates:
        """Decays, shares and betas of tokens ``x``, from their logits."""
        shape = self.groups, self.heads_per_group
        return (gates_step if step else gates)(x, heads, self.log_rate, erase, shape=shape, erase_max=self.erase_max)

    def _widened(self, i: HeadInputs) -> HeadInputs:
        """With q and k after the heads' first layer, ``[..., G, F]``, where they have one."""
        if self.first_layer is None:
            return i
        q, k = (first_layer(z, self.first_layer, self.first_slope, eps=self.eps) for z in (i.q, i.k))
        return i._replace(q=q, k=k)

    def _erase(self, k: Tensor, beta: Tensor | None) -> Tensor:
        """e of the ops: one number a group where the erase vector is that times k."""
        if beta is None:
            return k.new_zeros(k.shape[:-1])
        if self.erase == "free":
            return k * beta.view_as(k).to(k.dtype)
        if self.erase_diagonal is not None:
            # Largest entry 1: then beta k^T (d k) <= beta <= 1.98, contractive in the norm weighted by d.
            d = torch.exp(self.erase_diagonal - self.erase_diagonal.amax(-1, keepdim=True))
            return k * beta[..., None].to(k.dtype) * d.to(k.dtype)
        return beta

    def _output(
        self, y: Tensor, units: Tensor | None, w: Tensor, residual: Tensor, share: Tensor | None, gate: Tensor | None
    ) -> Tensor:
        """From what the heads read to what the last matrix takes."""
        if self.surprise_gain is None:
            y = head_outputs(y, units, share, gate, eps=self.eps)
        else:
            y = head_outputs(y, units, share, None, eps=self.eps)
            s = surprise(w, residual)
            gain = self.surprise_gain.to(s.dtype).view(s.shape[-2:])
            y = y * (1 + gain * s)[..., None].to(y.dtype)
            if gate is not None:
                y = y * torch.sigmoid(gate).view_as(y)
        return y.flatten(-3)

    def _low(self, x: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.gate_names, x.split(self.in_split[1:], -1), strict=True))

    def forward(self, x: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, State]:
        channels = self.in_split[0]
        if isinstance(self.in_proj, Linear):
            # Two products, so that the gradient of the first need not be copied beside that of the second.
            qkv, rest = (linear(x, w) for w in (self.in_proj.weight[:channels], self.in_proj.weight[channels:]))
        else:
            qkv, rest = self.in_proj(x).split((channels, sum(self.in_split[1:])), -1)
        low = self._low(rest)
        logits = {name: up(low[name]) for name, up in self._ups().items()}
        heads = None if self.head_proj is None else self.head_proj(x)
        scalars = self._scalars(x, heads, logits.get("erase"))
        heads_of = self._heads_packed if cu_seqlens is not None and torch.compiler.is_compiling() else self._heads
        y, read, w, residual, after = heads_of(qkv, logits.get("write"), scalars, state, cu_seqlens)
        y = self._output(y, read, w, residual, scalars.share, logits.get("output"))
        return self.out_proj(y), after

    def _heads(
        self, qkv: Tensor, write: Tensor | None, scalars: Gates, state: State | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, State]:
        """What the heads read from the context: y, the read of the units, w, residual, and the state after."""
        before: State = state or {}
        after: State = {}
        split = self.split
        if split is not None and self.conv is not None:
            before = {"conv": split.tail(qkv, self.conv.shape[1] - 1, cu_seqlens)}
        i, tail = head_inputs(
            qkv,
            self.conv,
            self.slope,
            write,
            self.units_gain if self.block else None,
            before.get("conv"),
            groups=self.groups,
            heads=(self.heads_per_group, self.value_width),
            eps=self.eps,
            normalize=self.first_layer is None,
            cu_seqlens=cu_seqlens,
        )
        if tail is not None:
            after["conv"] = tail
        fast = before.get("fast_weights")
        options: dict[str, Any] = {"cu_seqlens": cu_seqlens, "return_residual": True}
        # Whoever looks at the keys has to see them after the first layer.
        hidden = split is None and self.observer is None and self.watcher is None
        if self.first_layer is not None and hidden and self.erase in ("scalar", "none"):
            beta = self._erase(i.k, scalars.beta)
            first = self.first_layer, self.first_slope
            y, after["fast_weights"], residual = perceive_wide(  # type: ignore[misc]
                i.q, i.k, *first, beta, i.w, scalars.log_decay, fast, eps=self.eps, **options
            )
        else:
            i = self._widened(i)
            e = self._erase(i.k, scalars.beta)
            inputs = i.q, i.k, e, i.w, scalars.log_decay
            if self.observer is not None:
                self.observer(*perceive_transition(i.k, e, scalars.log_decay))
            if split is not None:
                y, after["fast_weights"], residual = split.perceive(*inputs, cu_seqlens)
            else:
                y, after["fast_weights"], residual = perceive(*inputs, fast, **options)  # type: ignore[misc]
        if self.watcher is not None:
            self.watcher(i.k, i.w, scalars.log_decay, scalars.beta, residual)
        read = None
        if i.units_q is not None and i.units_k is not None:
            units = Units(*(before[name] for name in _UNITS)) if state else None
            score = residual.detach().sum(-1)  # surprise of a token for the group
            rows = self.kept[1]
            # What is read is what is kept, in a text read at once as in steps: so its pieces do not matter.
            units_k, units_w = (x if rows is None else to_rows(x, rows).to(x.dtype) for x in (i.units_k, i.w))
            if split is not None:
                units = split.units(units_k, units_w, score, self.block, self.slots, cu_seqlens)
            read, units = memorise(
                i.units_q,
                units_k,
                units_w,
                score,
                self.sink,
                units,
                block=self.block,
                slots=self.slots,
                activation=self.read,
                cu_seqlens=cu_seqlens,
            )
            if rows is not None:
                units = units._replace(keys=to_rows(units.keys, rows), values=to_rows(units.values, rows))
            after.update(zip(_UNITS, units, strict=True))
        if self.kept[0] is not None:
            after["fast_weights"] = after["fast_weights"].to(self.kept[0])
        return y, read, i.w, residual, after

    @torch.compiler.disable
    def _heads_packed(self, *args: Any) -> tuple[Tensor, Tensor | None, Tensor, Tensor, State]:
        """`_heads` of packed sequences: they lie differently in every batch, each would compile to its own program."""
        found = self._heads(*args)
        vary(*found[-1].values())
        return found

    def _whole(self) -> Layer | None:
        """What `perception_step` takes, of a layer that has all it is made for."""
        ups = {name: up for name, up in self._ups().items() if isinstance(up, Linear)}
        if self.conv is None or self.log_rate is None or not self.block or len(ups) < 3 or self.erase != "scalar":
            return None
        if self.first_layer is not None or self.surprise_gain is not None:
            return None
        begin = dict(zip(self.gate_names, accumulate(self.in_split[:-1]), strict=True))
        write, erase, output = (
            Gate(ups[name].weight, ups[name].bias, begin[name]) for name in ("write", "erase", "output")
        )
        return Layer(
            groups=self.groups,
            heads=(self.heads_per_group, self.value_width),
            write=write,
            erase=erase,
            output=output,
            conv=self.conv,
            slope=self.slope,
            gain=self.units_gain,
            log_rate=self.log_rate,
            sink=self.sink,
            erase_max=self.erase_max,
            eps=self.eps,
            block=self.block,
            slots=self.slots,
            activation=self.read,
        )

    def step(self, x: Tensor, state: State, state_indices: Tensor | None = None) -> Tensor:
        products = [self.in_proj.product()]
        if self.head_proj is not None:
            products.append(self.head_proj.product())
        projected, *more = linear_step(x, products, eps=self.eps)
        heads = more[0] if more else None
        if (layer := self._whole()) is not None and heads is not None:
            own = Token(state["conv"], state["fast_weights"], Units(*(state[name] for name in _UNITS)))
            if serves(projected, layer, own):
                y = perception_step(projected, heads, layer, own, state_indices)
                return linear_step(y, [self.out_proj.product()], residual=x)[0]
        qkv, low = projected.split((self.in_split[0], sum(self.in_split[1:])), -1)
        logits, ups = {}, self._ups()
        if ups:
            begin = dict(zip(self.gate_names, accumulate(self.in_split[1:-1], initial=0), strict=True))
            found = linear_step(low, [up.product(begin[name]) for name, up in ups.items()])
            logits = dict(zip(ups, found, strict=True))
        scalars = self._scalars(x, heads, logits.get("erase"), step=True)
        i = head_inputs_step(
            qkv,
            self.conv,
            self.slope,
            logits.get("write"),
            self.units_gain if self.block else None,
            state.get("conv"),
            state_indices,
            groups=self.groups,
            heads=(self.heads_per_group, self.value_width),
            eps=self.eps,
            normalize=self.first_layer is None,
        )
        i = self._widened(i)
        y, residual = perceive_step(
            i.q,
            i.k,
            self._erase(i.k, scalars.beta),
            i.w,
            scalars.log_decay,
            state["fast_weights"],
            state_indices,
            return_residual=True,
        )
        read = None
        if i.units_q is not None and i.units_k is not None:
            read = memorise_step(
                i.units_q,
                i.units_k,
                i.w,
                residual,
                self.sink,
                Units(*(state[name] for name in _UNITS)),
                state_indices,
                block=self.block,
                slots=self.slots,
                activation=self.read,
            )
        y = self._output(y, read, i.w, residual, scalars.share, logits.get("output"))
        return linear_step(y, [self.out_proj.product()], residual=x)[0]

    def init_state(self, batch: int, *, dtype: torch.dtype, device: torch.device | str, context: int = 0) -> State:
        G, m, V = self.groups, self.heads_per_group, self.value_width
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        fast, rows = self.kept
        state: State = {}
        if self.conv is not None:
            shape = (batch, self.conv.shape[1] - 1, self.conv.shape[0])
            state["conv"] = torch.zeros(shape, dtype=dtype, device=device)
        state["fast_weights"] = torch.zeros((batch, G, self.features, m, V), dtype=fast or wide, device=device)
        if self.block:
            units = units_init(
                batch, G, self.read_width, m, V, block=self.block, slots=self.slots, dtype=dtype, device=device
            )
            units = units._replace(keys=units.keys.to(rows or dtype), values=units.values.to(rows or dtype))
            state.update(zip(_UNITS, units, strict=True))
        return state

    @staticmethod
    def cost(config: ModelConfig, *, context: int, dtype_bytes: int) -> Cost:
        c = config.perception
        D, G, H, R, W, V, r = config.d_model, c.groups, c.heads, c.read_width, c.features, c.value_width, c.gate_rank
        values = H * V
        channels = 2 * G * R + values
        gates = [kind for kind, on in _gates(config) if on]
        up = {"erase": G * W if c.erase == "free" else G, "write": values, "output": values}
        heads = H * (c.decay + bool(c.block))
        matrices = D * (channels + r * len(gates)) + D * heads + sum(r * up[g] for g in gates) + values * D
        vectors = channels * c.conv_width + heads + sum(up[g] for g in gates) + H * c.decay + H * c.surprise
        vectors += channels * c.learned_slope + (G * W if c.erase == "diagonal" else 0)
        vectors += G * W if c.wide and c.learned_slope else 0
        vectors += 2 * R + G if c.block else 0
        first = G * R * W if c.wide else 0
        rows = c.slots + c.block
        perceiving = G * (4 * CHUNK * W + 6 * W * values // G) + 4 * CHUNK * values
        remembering = 2 * rows * (G * R + values) if c.block else 0
        wide_bytes = max(4, dtype_bytes)
        state = max(c.conv_width - 1, 0) * channels * dtype_bytes + W * values * wide_bytes
        if c.block:
            state += rows * (G * R + values) * dtype_bytes + rows * G * wide_bytes + 8
        return Cost(matrices + first + vectors, 2 * matrices + 4 * first + perceiving + remembering, state)


def surprise(w: Tensor, residual: Tensor) -> Tensor:
    """How badly heads' memories predicted what was written: ``|u| / (|u| + |w|)`` of w ``[..., m, V]`` and the squared
    norms of the residuals u ``[..., m]`` -> ``[..., m]`` from 0 (known) to 1; an empty memory's is 1/2."""
    u = residual.clamp(min=1e-12).sqrt()
    return u / (u + w.to(residual.dtype).norm(dim=-1) + 1e-6)


@contextlib.contextmanager
def watching(
    model: nn.Module, see: Callable[[int, Tensor, Tensor, Tensor, Tensor | None, Tensor], None]
) -> Iterator[None]:
    """In the ``with`` block ``see`` is given what the perception layers of an LM (or of its stage) do with every text
    that is read at once: the layer's number, k ``[B, T, G, F]``, w ``[B, T, G, m, V]``, log_decay ``[B, T, G, m]``,
    beta (what erasing is computed from) or None, and the residuals' squared norms ``[B, T, G, m]``. Steps are not
    seen."""
    blocks: Any = model.blocks
    mixers = [(int(n), block.mixer) for n, block in blocks.named_children() if isinstance(block.mixer, PerceptionMixer)]
    for n, mixer in mixers:
        mixer.watcher = partial(see, n)
    try:
        yield
    finally:
        for _, mixer in mixers:
            mixer.watcher = None


def _gates(config: ModelConfig) -> tuple[tuple[str, bool], ...]:
    """The low-rank gates in the order of the fused projection, and whether they are on."""
    c = config.perception
    return ("erase", c.erase != "none"), ("write", c.write_gate), ("output", c.output_gate)
