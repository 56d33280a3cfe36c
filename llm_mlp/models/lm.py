"""The only Block and the only LM; the transformer baseline and hybrids are other mixer patterns of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from llm_mlp.config import ModelConfig
from llm_mlp.models.attention import AttentionMixer
from llm_mlp.models.ffn import FFN
from llm_mlp.models.mixer import STATES, Cost, Linear, Mixer, State, linear, rms_norm, vary
from llm_mlp.models.perception import PerceptionMixer
from llm_mlp.models.routing import Routing
from llm_mlp.ops import linear_cross_entropy
from llm_mlp.ops.cross_entropy import softcap
from llm_mlp.ops.linear_step import Product, linear_step
from llm_mlp.ops.perceive import check_indices

MIXERS: dict[str, Any] = {"perception": PerceptionMixer, "attention": AttentionMixer}
# What is computed again in the backward pass: nothing, everything but the costly products and ops, each block whole.
Checkpointing = Literal["none", "selective", "full"]
# Costly against what keeping their results takes; what lies between them is cheap.
_KEPT = {
    "aten.mm",
    "aten.addmm",
    "aten._scaled_mm",
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_cudnn_attention",
    "llm_mlp.perceive",
    "llm_mlp.memorise_slots",
    "llm_mlp.memorise_read",
}


def _policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if str(op.overloadpacket) in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def selective() -> Any:
    """What `torch.utils.checkpoint.checkpoint` takes as ``context_fn`` to keep the results of `_KEPT` alone."""
    return create_selective_checkpoint_contexts(_policy)


@dataclass
class Output:
    """What `LM.forward` returns; fields that were not asked for are None."""

    logits: Tensor | None  # [B, T or 1, vocabulary]
    loss: Tensor | None  # scalar, nats a counted target (or [B, T] when unreduced)
    state: State


class Block(nn.Module):
    """``x + mixer(norm(x))``, then ``x + ffn(norm(x))``; with routing, earlier outputs are added before."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.routing: Any = Routing(config, layer) if Routing.routed(config, layer) else None
        self.mixer: Any = MIXERS[config.mixer(layer)](config, layer)
        self.ffn = FFN(config)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def init_weights(self) -> None:
        for part in (self.routing, self.mixer, self.ffn):
            if part is not None:
                part.init_weights()

    def forward(
        self, x: Tensor, earlier: list[Tensor] | None, state: State | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, State]:
        """x ``[B, T, D]`` -> the same, and the mixer's state."""
        if self.routing is not None:
            x = self.routing(x, earlier or [])
        y, after = self.mixer(rms_norm(x, self.eps), state, cu_seqlens)
        x = x + self.dropout(y)
        return x + self.dropout(self.ffn(rms_norm(x, self.eps))), after

    def step(self, x: Tensor, earlier: list[Tensor], state: State, state_indices: Tensor | None) -> Tensor:
        """One token, ``[B, D]`` -> ``[B, D]``; the state changes in place."""
        if self.routing is not None:
            x = self.routing(x, earlier)
        return self.ffn.step(self.mixer.step(x, state, state_indices), self.eps)


class LM(nn.Module):
    """A language model. ``state`` is a flat dict of tensors, batch first: ``layers.3.fast_weights`` and so on."""

    quantization = "none"  # of the matrices; set by `llm_mlp.weights.hold`
    kept = "auto"  # of `STATES`; set by `keep_state`

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks: Any = nn.ModuleList(Block(config, i) for i in range(config.n_layers))
        self.head: Any = None if config.tie_embeddings else Linear(config.d_model, config.vocab_size, bias=False)
        self.activation_checkpointing: Checkpointing = "none"

    def init_weights(self) -> None:
        """Initial values (torch's global generator): the last layers of all branches and the head are zero."""
        std = self.config.d_model**-0.5 if self.head is None else 1.0  # the embedding is normed; a tied head is not
        nn.init.normal_(self.embedding.weight, std=std)
        for block in self.blocks:
            block.init_weights()
        if self.head is not None:
            nn.init.zeros_(self.head.weight)

    @torch.no_grad()
    def randomize_(self, seed: int = 0) -> LM:
        """Add noise to every parameter, so that nothing that starts at zero hides in a test or a benchmark."""
        device = self.embedding.weight.device  # where the noise is made: a large model's takes long on a CPU
        generator = torch.Generator(device).manual_seed(seed)
        for p in self.parameters():
            scale = 0.5 / p.shape[-1] ** 0.5 if p.ndim > 1 else 0.1
            p.add_(scale * torch.randn(p.shape, generator=generator, dtype=torch.float64, device=device).to(p))
        return self

    def keep_state(self, setting: str) -> LM:
        """From now on states are kept in this setting (`STATES`): fast weights + memorised rows. Returns the model.

        Raises:
            ValueError: an unknown setting.
        """
        if setting not in STATES:
            raise ValueError(f"state {setting!r}: expected {', '.join(STATES)}")
        self.kept = setting
        for block in self.blocks:
            block.mixer.kept = STATES[setting]
        return self

    def fused_rows(self) -> dict[str, tuple[int, ...]]:
        """Parameters that hold several matrices on top of each other, and how many rows each has."""
        return {
            f"{name}.{weight}": rows
            for name, module in self.named_modules()
            if isinstance(module, Mixer)
            for weight, rows in module.fused_rows.items()
        }

    def forward(
        self,
        tokens: Tensor,
        state: State | None = None,
        cu_seqlens: Tensor | np.ndarray | None = None,
        targets: Tensor | None = None,
        logits: Literal["all", "last", "none"] = "all",
        reduction: Literal["mean", "sum", "none"] = "mean",
    ) -> Output:
        """Read ``tokens [B, T]`` (int64), continuing ``state``.

        Args:
            state: from `init_state` or an earlier call; None starts afresh.
            cu_seqlens: CPU integers ``[N+1]``, tensor or array: N packed sequences (B = 1); the state is ``[N, ...]``.
            targets: ``[B, T]``, -100 not counted: gives the loss without the full logits in memory.
            logits: which logits to return; those of ``last`` are ``[B, 1, V]`` (packed: ``[1, N, V]``, of the last
                token of each sequence; none of them may be empty). With targets none are returned.
            reduction: of the loss; ``none`` is ``[B, T]`` without gradients.

        Raises:
            ValueError: a token outside the vocabulary (checked on the CPU), or shapes that do not fit.
        """
        if tokens.ndim != 2:
            raise ValueError(f"tokens have shape {tuple(tokens.shape)}, expected [B, T]")
        self._check_tokens(tokens)
        if cu_seqlens is not None:
            cu_seqlens = torch.as_tensor(cu_seqlens)
        if logits not in ("all", "last", "none"):
            raise ValueError(f"logits = {logits!r}: expected all, last or none")
        if logits == "last" and cu_seqlens is not None and not bool((cu_seqlens.diff() > 0).all()):
            raise ValueError("logits='last': a sequence is empty and has no last token")
        x, after = self._hidden(tokens, state, cu_seqlens)
        if targets is not None:
            return Output(None, self.head_loss(x, targets, reduction), after)
        if logits == "none":
            return Output(None, None, after)
        if logits == "last":
            if x.shape[1] == 0:
                raise ValueError("logits='last' needs at least one token")
            x = x[:, -1:] if cu_seqlens is None else x[:, (cu_seqlens[1:].long() - 1).to(x.device)]
        return Output(self._logits(x), None, after)

    def hidden(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """The final normed hidden states ``[B, T, D]``, and the state; arguments as `forward`."""
        self._check_tokens(tokens)
        return self._hidden(tokens, state, None)

    def _hidden(self, tokens: Tensor, state: State | None, cu_seqlens: Tensor | None) -> tuple[Tensor, State]:
        x = rms_norm(self.embedding(tokens), self.config.norm_eps)
        x, after = self.through(enumerate(self.blocks), x, [], state, cu_seqlens)
        return rms_norm(x, self.config.norm_eps), after

    def through(
        self,
        blocks: Iterable[tuple[int, nn.Module]],
        x: Tensor,
        earlier: list[Tensor],
        state: State | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, State]:
        """x ``[B, T, D]`` through consecutive blocks, each given with its layer's number -> the same, and their state.

        With routing, ``earlier`` are the inputs of all layers before, to which those of these blocks are added.
        """
        after: State = {}
        routed = self.config.routing.last_layers > 0
        states = self._by_layer(state) if state else None
        for i, block in blocks:
            own = states[i] if states else None
            if cu_seqlens is not None and block._compiled_call_impl is not None:
                vary(cu_seqlens, *(own or {}).values())
            args = (x, list(earlier) if block.routing is not None else None, own, cu_seqlens)
            if routed:
                earlier.append(x)
            if self.activation_checkpointing != "none" and torch.is_grad_enabled():
                # Without dropout there is no random state to go back to (nor may a CUDA graph ask for it).
                random = self.config.dropout > 0
                keep: dict[str, Any] = {"context_fn": selective} if self.activation_checkpointing == "selective" else {}
                x, new = checkpoint(block, *args, use_reentrant=False, preserve_rng_state=random, **keep)
            else:
                x, new = block(*args)
            after.update({f"layers.{i}.{name}": t for name, t in new.items()})
        return x, after

    @torch.no_grad()
    def step(self, tokens: Tensor, state: State, state_indices: Tensor | None = None) -> Tensor:
        """One token of each sequence: ``tokens [B]`` -> logits ``[B, vocabulary]``; the state changes in place.

        ``state_indices`` (distinct integers ``[B]``, -1 a padding row) say which rows of the state's pool are used.
        """
        self._check_tokens(tokens)
        check_indices("LM.step", state_indices, len(tokens), len(next(iter(state.values()))))
        # A token is a few hundred small operations; without autograd's books each is cheaper.
        with torch.inference_mode():
            x = rms_norm(self.embedding(tokens), self.config.norm_eps)
            earlier: list[Tensor] = []
            for i, (block, own) in enumerate(zip(self.blocks, self._by_layer(state), strict=True)):
                before = dict(own)
                y = block.step(x, earlier, own, state_indices)
                earlier.append(x)
                x = y
                # Most tensors change in place; a cache that has grown is another one.
                state.update({f"layers.{i}.{name}": t for name, t in own.items() if t is not before[name]})
            head = Product(self.embedding.weight) if self.head is None else self.head.product()
            product = linear_step(x, [head], eps=self.config.norm_eps)[0]
            logits = self._capped(product)
        return logits.clone()  # a plain tensor

    def init_state(
        self, batch: int = 1, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None, context=0
    ) -> State:
        """The state before any token; ``context``: tokens an attention layer's cache gets room for at once."""
        weight = next(self.parameters())
        dtype, device = dtype or weight.dtype, device or weight.device
        return {
            f"layers.{i}.{name}": t
            for i, block in self.blocks.named_children()  # of a stage of a pipeline not all are here
            for name, t in block.mixer.init_state(batch, dtype=dtype, device=device, context=context).items()
        }

    def _by_layer(self, state: State) -> list[State]:
        """The state of each layer, under the mixer's own names."""
        parts: list[State] = [{} for _ in range(self.config.n_layers)]
        for full, t in state.items():
            _, layer, name = full.split(".", 2)
            parts[int(layer)][name] = t
        return parts

    def _head_weight(self) -> Tensor:
        """The head as one tensor; where it is quantised that is made for the call."""
        if self.head is None:
            return self.embedding.weight
        weight = self.head.product().weight
        return weight if isinstance(weight, Tensor) else weight.dequantize(self.embedding.weight.dtype)

    def head_loss(self, x: Tensor, targets: Tensor, reduction: str) -> Tensor:
        """From the final normed hidden states ``[B, T, D]`` to the loss, as `forward` returns it."""
        return linear_cross_entropy(x, self._head_weight(), targets, cap=self.config.logit_cap, reduction=reduction)

    def _logits(self, x: Tensor) -> Tensor:
        return self._capped(linear(x, self.embedding.weight) if self.head is None else self.head(x))

    def _capped(self, logits: Tensor) -> Tensor:
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        return softcap(logits.to(wide), self.config.logit_cap)

    def _check_tokens(self, tokens: Tensor) -> None:
        # On a GPU this would wait for the device; there an embedding lookup out of range asserts by itself.
        if tokens.device.type == "cpu" and tokens.numel() and not torch.compiler.is_compiling():
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= self.config.vocab_size:
                bad = low if low < 0 else high
                raise ValueError(f"token {bad} is outside the vocabulary of {self.config.vocab_size}")


def model_cost(config: ModelConfig, *, context: int = 2048, dtype_bytes: int = 2) -> Cost:
    """Parameters, forward FLOPs a token (matrix products, at a context) and state bytes, from the config alone."""
    D, vocabulary = config.d_model, config.vocab_size
    total = Cost(D * vocabulary * (1 if config.tie_embeddings else 2), 2 * D * vocabulary)
    for i, name in enumerate(config.mixers):
        total = total + MIXERS[name].cost(config, context=context, dtype_bytes=dtype_bytes)
        total = total + FFN.cost(config) + Routing.cost(config, i)
    return total


def build_model(config: ModelConfig, *, seed: int = 0, device: torch.device | str = "cpu") -> LM:
    """An initialised model; the same seed gives the same weights on every device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LM(config)
        model.init_weights()
    return model.to(device)
