"""The baseline mixer: causal softmax attention (RoPE, QK-norm, torch's SDPA) with a key/value cache."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_mlp.config import ModelConfig
from llm_mlp.models.mixer import Cost, Linear, Mixer, State, init_linear, rms_norm, vary
from llm_mlp.ops.backend import sequence_bounds


class AttentionMixer(Mixer):
    """State: ``keys, values [N, H, capacity, d]`` and ``length [N]``; the one state here that grows."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        c = config.attention
        self.heads, self.head_dim, self.theta, self.qk_norm = c.heads, c.head_dim, c.rope_theta, c.qk_norm
        self.eps = config.norm_eps
        D = config.d_model
        self.fused_rows = {"qkv.weight": (D, D, D)}
        self.qkv = Linear(D, 3 * D, bias=False)
        self.out_proj = Linear(D, D, bias=False)

    def init_weights(self) -> None:
        init_linear(self.qkv.weight)
        nn.init.zeros_(self.out_proj.weight)

    def _rotated(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x ``[B, T, D]`` at ``position [B or 1, T]`` -> q, k, v ``[B, H, T, d]``."""
        q, k, v = (t.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        frequency = self.theta ** (-torch.arange(0, self.head_dim, 2, device=x.device, dtype=wide) / self.head_dim)
        angle = position[:, None, :, None].to(wide) * frequency
        cos, sin = angle.cos(), angle.sin()

        def rope(t: Tensor) -> Tensor:
            if self.qk_norm:
                t = rms_norm(t, self.eps)
            a, b = t.to(wide).chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(v.dtype)

        return rope(q), rope(k), v

    def forward(self, x: Tensor, state: State | None = None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, State]:
        if cu_seqlens is not None:
            return self._packed(x, state, cu_seqlens)
        B, T, _ = x.shape
        if not state:
            q, k, v = self._rotated(x, torch.arange(T, device=x.device)[None])
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True) if T else v
            after = {"keys": k, "values": v, "length": torch.full((B,), T, device=x.device)}
            return self.out_proj(y.transpose(1, 2).flatten(2)), after
        length = state["length"]
        position = length[:, None] + torch.arange(T, device=x.device)
        q, k, v = self._rotated(x, position)
        capacity = int(length.max()) + T if B else T
        old = min(capacity, state["keys"].shape[2])
        index = position[:, None, :, None].expand(-1, self.heads, -1, self.head_dim)

        def grown(cache: Tensor, new: Tensor) -> Tensor:
            longer = F.pad(cache[:, :, :old].to(new.dtype), (0, 0, 0, capacity - old))
            return longer.scatter(2, index, new)

        keys, values = grown(state["keys"], k), grown(state["values"], v)
        seen = torch.arange(capacity, device=x.device) <= position[:, None, :, None]
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen) if T else v
        after = {"keys": keys, "values": values, "length": length + T}
        return self.out_proj(y.transpose(1, 2).flatten(2)), after

    @torch.compiler.disable  # of as many parts as there are sequences
    def _packed(self, x: Tensor, state: State | None, cu_seqlens: Tensor) -> tuple[Tensor, State]:
        """One sequence after another: plain, and enough for a baseline."""
        bounds = sequence_bounds(cu_seqlens, x.shape[0], x.shape[1], "attention")
        ys, states = [], []
        for n, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False)):
            own = {name: t[n : n + 1] for name, t in state.items()} if state else None
            y, after = self.forward(x[:, a:b], own)
            ys.append(y)
            states.append(after)
        if not states:
            return x, self.init_state(0, dtype=x.dtype, device=x.device)
        longest = max(s["keys"].shape[2] for s in states)

        def stacked(name: str) -> Tensor:
            return torch.cat([F.pad(s[name], (0, 0, 0, longest - s[name].shape[2])) for s in states])

        packed = {
            "keys": stacked("keys"),
            "values": stacked("values"),
            "length": torch.cat([s["length"] for s in states]),
        }
        vary(*packed.values())
        return torch.cat(ys, 1), packed

    def step(self, x: Tensor, state: State, state_indices: Tensor | None = None) -> Tensor:
        return x + self._step(rms_norm(x, self.eps), state, state_indices)

    def _step(self, x: Tensor, state: State, state_indices: Tensor | None) -> Tensor:
        B = x.shape[0]
        rows = torch.arange(B, device=x.device) if state_indices is None else state_indices
        valid = rows >= 0
        if not bool(valid.all()):
            y = torch.zeros_like(x)
            if bool(valid.any()):
                y[valid] = self._step(x[valid], state, rows[valid])
            return y
        length = state["length"][rows]
        longest = int(length.max()) + 1
        if longest > state["keys"].shape[2]:
            # Room for twice as much, so that a token costs a constant share of the copying.
            room = 2 * longest - state["keys"].shape[2]
            with torch.inference_mode(False), torch.no_grad():  # the state outlives this step
                for name in ("keys", "values"):
                    state[name] = F.pad(state[name], (0, 0, 0, room))
        q, k, v = self._rotated(x[:, None], length[:, None])
        state["keys"][rows, :, length] = k[:, :, 0].to(state["keys"].dtype)
        state["values"][rows, :, length] = v[:, :, 0].to(state["values"].dtype)
        state["length"][rows] = length + 1
        keys, values = state["keys"][:, :, :longest], state["values"][:, :, :longest]
        if state_indices is not None:
            keys, values = keys[rows], values[rows]
        even = bool((length == length[0]).all())
        mask = None if even else torch.arange(longest, device=x.device) <= length[:, None, None, None]
        y = F.scaled_dot_product_attention(q, keys.to(q.dtype), values.to(q.dtype), attn_mask=mask)
        return self.out_proj(y.flatten(1))

    def init_state(self, batch: int, *, dtype: torch.dtype, device: torch.device | str, context: int = 0) -> State:
        shape = (batch, self.heads, context, self.head_dim)
        return {
            "keys": torch.zeros(shape, dtype=dtype, device=device),
            "values": torch.zeros(shape, dtype=dtype, device=device),
            "length": torch.zeros(batch, dtype=torch.long, device=device),
        }

    @staticmethod
    def cost(config: ModelConfig, *, context: int, dtype_bytes: int) -> Cost:
        D = config.d_model
        return Cost(4 * D * D, 8 * D * D + 4 * context * D, 2 * context * D * dtype_bytes + 8)
