"""`Context`, the state of a model after a text; `Reader`, which makes and continues contexts with a model."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import llm_mlp
from llm_mlp.context.format import ContextError, Manifest, digest, read, tensors_digest, text_digest, write
from llm_mlp.data.tokenizer import Tokenizer
from llm_mlp.infer import Start, read_tokens
from llm_mlp.infer.prefill import PREFILL
from llm_mlp.models import LM
from llm_mlp.models.mixer import State

log = logging.getLogger("llm_mlp.context")

STATE, TRANSITION = "state.", "transition."  # before the names of those tensors in a file


@dataclass(frozen=True)
class Context:
    """A text and the state after it. Nothing changes it: what continues it is another one, what forks it the same."""

    manifest: Manifest
    tokens: Tensor  # int32 [T], on the CPU
    state: State
    logits: Tensor  # [1, vocabulary]
    transition: State | None = None  # layers.N.P and layers.N.log_a: the map that the whole text is, for composing

    @property
    def id(self) -> str:
        return self.manifest.id

    @property
    def bytes(self) -> int:
        """Of all tensors, wherever they are."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    @property
    def start(self) -> Start:
        """What `llm_mlp.infer.generate` goes on from."""
        return Start(self.tokens, self.state, self.logits)

    def to(self, device: torch.device | str) -> Context:
        """The same with its state on another device."""
        state, map_ = (
            None if part is None else {name: t.to(device) for name, t in part.items()}
            for part in (self.state, self.transition)
        )
        return Context(self.manifest, self.tokens, state or {}, self.logits.to(device), map_)

    def tensors(self) -> dict[str, Tensor]:
        """As they stand in a file."""
        found = {"tokens": self.tokens, "logits": self.logits, **{STATE + n: t for n, t in self.state.items()}}
        return found | {TRANSITION + n: t for n, t in (self.transition or {}).items()}

    def save(self, path: str | Path) -> None:
        """Write it, whole or not at all.

        Raises:
            ContextError: it could not be written.
        """
        write(Path(path), self.manifest, self.tensors())

    @classmethod
    def load(cls, path: str | Path) -> Context:
        """Read a file, on the CPU. `Reader.adopt` says whether it fits a model.

        Raises:
            ContextError: missing, truncated, altered or not a context.
        """
        manifest, tensors = read(Path(path))
        try:
            tokens, logits = tensors.pop("tokens"), tensors.pop("logits")
        except KeyError as error:
            raise ContextError(f"{path}: tensor {error} is missing; not a context of this project") from None
        own = tokens.ndim == 1 and tokens.dtype == torch.int32 and len(tokens) == manifest.tokens
        if not own or text_digest(tokens) != manifest.text:
            raise ContextError(f"{path}: its token ids are not those that its manifest tells of")
        state, transition = (
            {n.removeprefix(part): t for n, t in tensors.items() if n.startswith(part)} for part in (STATE, TRANSITION)
        )
        return cls(manifest, tokens, state, logits, transition or None)


class Reader:
    """A model and its tokenizer as what reads texts into contexts.

    Args:
        tokenizer: None where only ids are read; contexts then say so and fit any reader without one.
        transitions: contexts that are read from nothing keep the map that their text is (F x F numbers a group and
            layer more), so that they can be composed.
    """

    def __init__(self, model: LM, tokenizer: Tokenizer | None, *, transitions: bool = False) -> None:
        self.model, self.tokenizer, self.transitions = model, tokenizer, transitions

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Of config, quantisation, weights and tokenizer. Taken once: a model that is changed needs another reader."""
        config = json.dumps(self.model.config.model_dump(mode="json"), sort_keys=True)
        return {
            "config": hashlib.sha256(config.encode()).hexdigest()[:16],
            "quantization": self.model.quantization,
            "weights": tensors_digest(self.model.state_dict()).hexdigest()[:16],
            "tokenizer": self.tokenizer.fingerprint() if self.tokenizer else "none",
        }

    @cached_property
    def build(self) -> dict[str, str]:
        """What decides the last bits of a result, beside the device."""
        try:
            triton = version("triton")
        except PackageNotFoundError:
            triton = "none"
        return {
            "llm_mlp": llm_mlp.__version__,
            "torch": torch.__version__,
            "triton": triton,
            "machine": platform.machine(),
        }

    @cached_property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    # -- reading ---------------------------------------------------------------------------------------------------

    def encode(self, text: str, *, begin: bool) -> list[int]:
        """Ids of a text; ``begin``: after the separator that starts a text from nothing."""
        if self.tokenizer is None:
            raise ContextError("this reader has no tokenizer; give token ids")
        return [*([self.tokenizer.eos] if begin else []), *self.tokenizer.encode(text)]

    def create(
        self, tokens: Sequence[int] | Tensor, *, progress: Callable[[int], None] | None = None, mark: bool = True
    ) -> Context:
        """Read ids from nothing."""
        return self._read(None, tokens, None, progress, mark)

    def append(
        self,
        context: Context,
        tokens: Sequence[int] | Tensor,
        *,
        progress: Callable[[int], None] | None = None,
        mark: bool = True,
    ) -> Context:
        """Read on. ``mark``: the end is a place to come back to (`Store.undo`)."""
        return self._read(context, tokens, context, progress, mark)

    def pieces(
        self, begun: Context | None, tokens: Tensor, every: int, base: Context | None = None
    ) -> Iterable[Context]:
        """Contexts on the way to reading all of ``tokens``: from nothing, or behind ``base``, whose text they begin
        with.

        Args:
            begun: one of them, where a reading was interrupted; it is gone on from. every: tokens between them, rounded
                up to pieces of `PREFILL`; the last is that of the whole text.

        Raises:
            ContextError: nothing to read, or ``begun`` is of another text.
        """
        if len(tokens) <= (0 if base is None else len(base.tokens)):
            raise ContextError("there is nothing to read: the text is empty")
        if begun is not None:
            self.check_begun(begun, tokens, base, self.keeps_transitions(base))
        context = base if begun is None else begun
        done = 0 if context is None else len(context.tokens)
        stride = -(-every // PREFILL) * PREFILL
        while done < len(tokens):
            end = min(len(tokens), (done // stride + 1) * stride)
            context = self._read(context, tokens[done:end], base, None, end == len(tokens))
            done = end
            yield context

    def keeps_transitions(self, base: Context | None) -> bool:
        """Whether what is read behind ``base``, or from nothing, keeps the map that its text is."""
        return self.transitions if base is None else base.transition is not None

    def check_begun(self, begun: Context, tokens: Tensor, base: Context | None, transitions: bool) -> None:
        """Refuse an interrupted reading unless reading ``tokens`` behind ``base`` can go on from it.

        Raises:
            ContextError: it cannot.
        """
        done = len(begun.tokens)
        if done >= len(tokens) or not torch.equal(begun.tokens, tokens[:done].to(torch.int32)):
            raise ContextError("the interrupted reading is of another text; remove it (NAME.reading) to begin anew")
        if begun.manifest.parent != (None if base is None else base.id):
            raise ContextError(
                "the interrupted reading goes on from another version of the context; remove it (NAME.reading) to "
                "begin anew"
            )
        if transitions and begun.transition is None:
            raise ContextError("the interrupted reading keeps no transitions; remove it, or read on without them")

    def _read(
        self,
        before: Context | None,
        tokens: Sequence[int] | Tensor,
        parent: Context | None,
        progress: Callable[[int], None] | None,
        mark: bool,
    ) -> Context:
        """Behind ``before``, as what continues ``parent``: the same, or what a reading in pieces began with."""
        ids = torch.as_tensor(tokens, dtype=torch.int64).flatten()
        if before is None:
            with self.observed(None if self.transitions else False) as seen:
                state, logits = read_tokens(self.model, ids, progress=progress)
            return self._made(ids.to(torch.int32), state, logits, None, [len(ids)] if mark else [], seen)
        self.check(before.manifest)
        device = self.device
        own = {name: t.to(device) for name, t in before.state.items()}
        with self.observed(before.transition or False) as seen:
            state, logits = read_tokens(self.model, ids, own, position=len(before.tokens), progress=progress)
        both = torch.cat([before.tokens, ids.to(torch.int32)])
        marks = [*(parent.manifest.marks if parent else []), *([len(both)] if mark else [])]
        return self._made(both, state, logits, parent, marks, seen)

    @contextlib.contextmanager
    def observed(self, before: State | Literal[False] | None) -> Iterator[State | None]:
        """The text's transition, filled while it is read, going on from ``before`` (None: from nothing; False: none is
        kept)."""
        if before is False:
            yield None
            return
        seen: State = {} if before is None else {name: t.to(self.device) for name, t in before.items()}

        def observer(layer: str) -> Callable[[Tensor, Tensor], None]:
            def take(P: Tensor, log_a: Tensor) -> None:
                if f"{layer}.P" in seen:
                    P, log_a = P @ seen[f"{layer}.P"], log_a + seen[f"{layer}.log_a"]
                seen[f"{layer}.P"], seen[f"{layer}.log_a"] = P, log_a

            return take

        mixers = [block.mixer for block in self.model.blocks if hasattr(block.mixer, "observer")]
        for number, block in enumerate(self.model.blocks):
            if block.mixer in mixers:
                block.mixer.observer = observer(f"layers.{number}")
        try:
            yield seen
        finally:
            for mixer in mixers:
                mixer.observer = None

    def wrap(
        self,
        end: Start,
        parent: Context | None = None,
        transition: State | None = None,
        marks: Iterable[int] = (),
        pieces: int | None = None,
    ) -> Context:
        """The context of a text that was read elsewhere with this model.

        Args:
            parent: what it continues, or None. transition: what `observed` has seen of it. marks: numbers of tokens to
                come back to, beside its end and the parent's; those within the parent's text do not count.
            pieces: how the whole text was read (`Manifest.pieces`).
        """
        tokens = torch.as_tensor(end.tokens).to(torch.int32).cpu()
        before = len(parent.tokens) if parent else 0
        own = sorted({len(tokens), *(n for n in marks if before < n < len(tokens))})
        all_ = [*(parent.manifest.marks if parent else []), *own]
        return self._made(tokens, dict(end.state), end.logits, parent, all_, transition, pieces=pieces)

    def composed(self, end: Start) -> Context:
        """The context that `llm_mlp.context.compose.composing` has come to."""
        tokens = torch.as_tensor(end.tokens)
        return self._made(tokens, end.state, end.logits, None, [len(tokens)], None, composed=True)

    def _made(
        self,
        tokens: Tensor,
        state: State,
        logits: Tensor,
        parent: Context | None,
        marks: list[int],
        transition: State | None = None,
        **more: Any,
    ) -> Context:
        manifest = Manifest(
            tokens=len(tokens),
            text=text_digest(tokens),
            **self.fingerprints,
            dtypes=_dtypes(state),
            device=self.device_name,
            build=self.build,
            parent=parent.id if parent else None,
            marks=marks,
            replayed=more.pop("replayed", parent.manifest.replayed if parent else False),
            composed=more.pop("composed", parent.manifest.composed if parent else False),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            **more,
        )
        found = digest(manifest, Context(manifest, tokens, state, logits, transition).tensors())
        return Context(manifest.model_copy(update={"digest": found}), tokens, state, logits, transition)

    def replay(self, context: Context, tokens: int, nearest: Context | None) -> Context:
        """``context`` as it was after its first ``tokens`` tokens, read again from ``nearest`` (None: from nothing)."""
        ids = context.tokens[:tokens]
        done, own, kept = 0, None, context.transition is not None
        if nearest is not None:
            done, kept = len(nearest.tokens), nearest.transition is not None
            own = {name: t.to(self.device) for name, t in nearest.state.items()}
        with self.observed((nearest.transition if nearest else None) if kept else False) as seen:
            state, logits = read_tokens(self.model, ids[done:], own, position=done)
        return self.replayed(context, Start(ids, state, logits), nearest, seen)

    def replayed(
        self, context: Context, end: Start, nearest: Context | None, transition: State | None = None
    ) -> Context:
        """What `replay` gives, of a beginning of ``context`` that was read elsewhere with this model."""
        tokens = torch.as_tensor(end.tokens).to(torch.int32).clone()
        marks = [m for m in context.manifest.marks if m <= len(tokens)]
        more = {"replayed": True, "composed": context.manifest.composed}
        return self._made(tokens, dict(end.state), end.logits, nearest, marks, transition, **more)

    # -- fitting ---------------------------------------------------------------------------------------------------

    def check(self, manifest: Manifest, name: str = "context") -> None:
        """Refuse a context of another model or tokenizer, of weights held or a state kept in other bits; say so where
        device or build are others.

        Raises:
            ContextError: it does not fit.
        """
        for what, own in self.fingerprints.items():
            theirs = getattr(manifest, what)
            if what == "quantization" and theirs != own:
                made, held = (f"{x} weights" if x != "none" else "weights in full" for x in (theirs, own))
                raise ContextError(
                    f"{name} {manifest.id}: made with {made}, this model has {held}; load it with the --weights that "
                    "made the context, or read the text again"
                )
            if theirs != own:
                raise ContextError(
                    f"{name} {manifest.id}: made with another {what.rstrip('s') if what == 'weights' else what} "
                    f"({what} {theirs}, this model's is {own}); load that model or read the text again"
                )
        kinds = _dtypes(self.model.init_state(1, device="meta"))
        for part in sorted(kinds.keys() & manifest.dtypes.keys()):
            if manifest.dtypes[part] != kinds[part]:
                raise ContextError(
                    f"{name} {manifest.id}: keeps its {part} in {manifest.dtypes[part]}, this model in {kinds[part]}; "
                    "load it with the --state that made the context, or read the text again"
                )
        if (manifest.device, manifest.build) != (self.device_name, self.build):
            here = ", ".join(f"{n} {v}" for n, v in self.build.items())
            there = ", ".join(f"{n} {v}" for n, v in manifest.build.items())
            log.warning(
                "%s %s was made on %s (%s), this is %s (%s): results agree within rounding, not to the bit",
                name, manifest.id, manifest.device, there, self.device_name, here,
            )  # fmt: skip

    def adopt(self, context: Context, name: str = "context") -> Context:
        """A loaded context, checked, with its state on the model's device.

        Raises:
            ContextError: it does not fit this model.
        """
        self.fit(context, name)
        return context.to(self.device)

    def fit(self, context: Context, name: str = "context") -> None:
        """Refuse what is not a state of this model: whoever writes a file can write any digest into it.

        Raises:
            ContextError: it does not fit.
        """
        self.check(context.manifest, name)
        expected = self.model.init_state(1, device="meta")
        if found := expected.keys() ^ context.state.keys():
            raise ContextError(f"{name} {context.id}: part {min(found)} of the state is missing, or is not the model's")
        vocabulary = self.model.config.vocab_size
        shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
        shapes = {part: (t.shape, expected[part].shape) for part, t in context.state.items()}
        shapes["logits"] = context.logits.shape, (1, vocabulary)
        map_ = context.transition
        for part, S in expected.items():
            if map_ is not None and part.endswith(".fast_weights"):
                layer, (_, G, F, m, _) = part.removesuffix("fast_weights"), S.shape
                for own_name, size in ((f"{layer}P", (1, G, F, F)), (f"{layer}log_a", (1, G, m))):
                    shapes[TRANSITION + own_name] = map_[own_name].shape if own_name in map_ else torch.Size(), size
        for part, (own, want) in shapes.items():
            grows = 0 in want  # an attention layer's cache
            if len(own) != len(want) or (own != want and not grows):
                raise ContextError(f"{name} {context.id}: {part} has shape {tuple(own)}, the model's is {tuple(want)}")
        # Requests that are read in one go share their tensors' dtype.
        for part, t in context.state.items():
            if t.dtype != expected[part].dtype:
                raise ContextError(f"{name} {context.id}: {part} is {t.dtype}, the model's is {expected[part].dtype}")
            # Kernels compute places from it. Each composed document begins a block of its own.
            most = len(context.tokens) * max(1, self.model.config.perception.block)
            if part.endswith(".units.length") and not 0 <= int(t.min()) <= int(t.max()) <= most:
                raise ContextError(f"{name} {context.id}: {part} is no count of its {len(context.tokens)} tokens")
        if int(context.tokens.max()) >= vocabulary or int(context.tokens.min()) < 0:
            raise ContextError(f"{name} {context.id}: token ids outside the model's vocabulary of {vocabulary}")


def _dtypes(state: State) -> dict[str, str]:
    """Of the parts of a state, by their last names."""
    return {name.rsplit(".", 1)[-1]: str(t.dtype).removeprefix("torch.") for name, t in state.items()}


# -- looking --------------------------------------------------------------------------------------------------------


def describe(context: Context, model: LM | None = None) -> dict[str, Any]:
    """What a context holds: a row a layer with the norm of its fast weights, the memorised units in use and their
    scores (surprise), and, with a model, the half-lives of its heads in tokens (at a gate's resting value)."""
    layers: dict[int, dict[str, Any]] = {}
    for name, tensor in context.state.items():
        _, digits, part = name.split(".", 2)
        row = layers.setdefault(int(digits), {"layer": int(digits)})
        if part == "fast_weights":
            row["fast_weight_norm"] = round(float(tensor.float().norm()), 4)
            row["head_norms"] = [round(float(x), 4) for x in tensor[0].float().pow(2).sum((1, 3)).sqrt().flatten()]
        elif part == "units.scores":
            used = tensor[0][tensor[0] > -torch.inf]
            row["units_used"], row["units"] = used.numel(), tensor[0].numel()
            if len(used):
                row["surprise"] = {"median": round(float(used.median()), 4), "most": round(float(used.max()), 4)}
    if model is not None:
        for number, block in enumerate(model.blocks):
            rate = getattr(block.mixer, "log_rate", None)
            if rate is not None:
                # softplus(0) = ln 2 is the decay rate's share at rest: the half-life is 1 / lambda tokens.
                half = (-rate.detach().float()).exp()
                layers.setdefault(number, {"layer": number})["half_lives"] = [round(float(x), 1) for x in half]
    size = sum(t.numel() * t.element_size() for t in context.state.values())
    return {
        "manifest": context.manifest.model_dump(),
        "id": context.id,
        "state_bytes": size,
        "bytes": context.bytes,
        "layers": [layers[n] for n in sorted(layers)],
    }


def diff(a: Context, b: Context) -> dict[str, Any]:
    """How two contexts differ: the tokens they begin with alike, and a row a layer with the distance of their fast
    weights (relative to the first's norm) and the slots' rows that both hold."""
    n = min(len(a.tokens), len(b.tokens))
    unequal = (a.tokens[:n] != b.tokens[:n]).nonzero()
    rows: dict[int, dict[str, Any]] = {}
    for name in sorted(a.state.keys() & b.state.keys()):
        _, number, part = name.split(".", 2)
        row = rows.setdefault(int(number), {"layer": int(number)})
        x, y = a.state[name].float().cpu(), b.state[name].float().cpu()
        if x.shape != y.shape:
            continue
        if part == "fast_weights":
            row["fast_weight_distance"] = round(float((x - y).norm() / x.norm().clamp(min=1e-30)), 6)
        elif part == "units.keys":
            used_a, used_b = (c.state[name.replace("keys", "scores")].cpu()[0] > -torch.inf for c in (a, b))
            same = (x[0, :, :, None] == y[0, :, None]).all(-1) & used_a[:, :, None] & used_b[:, None]
            row["units_shared"], row["units_used"] = int(same.any(2).sum()), [int(used_a.sum()), int(used_b.sum())]
    return {
        "a": a.id,
        "b": b.id,
        "tokens": [len(a.tokens), len(b.tokens)],
        "common_tokens": int(unequal[0]) if len(unequal) else n,
        "same_weights": a.manifest.weights == b.manifest.weights,
        "layers": [rows[n] for n in sorted(rows)],
    }
