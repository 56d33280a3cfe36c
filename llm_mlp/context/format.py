"""The file of a context: one safetensors file, written whole or not at all, with a manifest in its header.

Tensors: ``tokens`` (int32 ``[T]``), ``logits`` (``[1, vocabulary]``, of what follows the text) and ``state.*``. The
manifest's digest covers every tensor and the manifest itself, so a file that was cut or altered is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT_VERSION = 1
SUFFIX = ".safetensors"


class ContextError(ValueError):
    """A context that cannot be used or written; the message names it and says what to do."""


class StorageError(ContextError):
    """A context that could not be stored: no room, or the disk failed. What was stored before still is."""


class Manifest(BaseModel):
    """What is known of a context without reading its tensors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: int = FORMAT_VERSION
    tokens: int = Field(ge=1, description="of the text")
    text: str = Field(description="SHA-256 of the token ids as little-endian int32")
    config: str = Field(description="fingerprint of the model's config")
    weights: str = Field(description="fingerprint of its weights")
    tokenizer: str
    quantization: str = "none"
    dtypes: dict[str, str] = Field(description="of the state's parts, as fast_weights: float32")
    device: str
    build: dict[str, str] = Field(description="versions that decide the last bits")
    parent: str | None = Field(None, description="id of the context that this one continues")
    marks: list[int] = Field(description="numbers of tokens at which something was read to its end, ascending")
    replayed: bool = Field(False, description="made from the token ids again, not kept: equal within rounding")
    pieces: int | None = Field(
        None,
        ge=1,
        description="tokens of the pieces, from its start on and alone, that it was read in; None: otherwise",
    )
    composed: bool = Field(False, description="of several texts: its state is no text's own")
    created: str = Field(description="UTC, ISO 8601")
    digest: str = Field("", description="SHA-256 of the tensors and of this manifest without the digest")

    @model_validator(mode="after")
    def _marks_in_text(self) -> Manifest:
        if self.marks != sorted(self.marks) or (self.marks and not 1 <= self.marks[0] <= self.marks[-1] <= self.tokens):
            raise ValueError(f"marks: numbers of tokens, ascending, from 1 to {self.tokens}")
        return self

    @property
    def id(self) -> str:
        """Short name of the content."""
        return self.digest[:16]


def text_digest(tokens: Tensor) -> str:
    """Of ids ``[T]``."""
    return hashlib.sha256(token_bytes(tokens)).hexdigest()


def token_bytes(tokens: Tensor) -> bytes:
    """Ids as little-endian int32."""
    return tokens.to(torch.int32).contiguous().cpu().numpy().astype("<i4").tobytes()


def tensors_digest(tensors: Mapping[str, Tensor]) -> Any:
    """A hash object that has taken names, dtypes, shapes and bytes."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name].detach().contiguous().cpu()
        found.update(f"{name} {t.dtype} {tuple(t.shape)}\n".encode())
        if t.numel():
            found.update(t.flatten().view(torch.uint8).numpy().data)
    return found


def digest(manifest: Manifest, tensors: Mapping[str, Tensor]) -> str:
    """What the manifest's digest has to be."""
    found = tensors_digest(tensors)
    # Files from before there were ``pieces`` have none, and the digest of a manifest without.
    without = {"digest", *(["pieces"] if manifest.pieces is None else [])}
    found.update(json.dumps(manifest.model_dump(exclude=without), sort_keys=True).encode())
    return found.hexdigest()


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its name when the ``with`` block ends, on disk before that.

    Raises:
        StorageError: it could not be written; what was at ``path`` still stands.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # mkstemp's own is for its owner alone
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        temporary = None
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{path}: could not be written ({error}); what was stored before is untouched") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write(path: Path, manifest: Manifest, tensors: Mapping[str, Tensor]) -> None:
    """Write a context's file. ``manifest`` has its digest."""
    # Saved from the CPU; clones where tensors share memory, which safetensors refuses.
    own = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    with whole(path) as temporary:
        save_file(own, temporary, metadata={"manifest": manifest.model_dump_json()})


def read_manifest(path: Path) -> Manifest:
    """The manifest of a file (its digest is not checked).

    Raises:
        ContextError: missing, truncated, not a context, or of another format.
    """
    with _opened(path) as file:
        return _manifest(path, file.metadata())


def read(path: Path) -> tuple[Manifest, dict[str, Tensor]]:
    """A context's manifest and tensors (on the CPU), checked against the digest.

    Raises:
        ContextError: missing, truncated, altered, not a context, or of another format.
    """
    with _opened(path) as file:
        manifest = _manifest(path, file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    if digest(manifest, tensors) != manifest.digest:
        raise ContextError(f"{path}: altered since it was written (its digest does not match); use another copy")
    return manifest, tensors


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise ContextError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ContextError(f"{path}: truncated or not a safetensors file ({error})") from None


def _manifest(path: Path, metadata: Mapping[str, str] | None) -> Manifest:
    text = (metadata or {}).get("manifest")
    if text is None:
        raise ContextError(f"{path}: no manifest in it; not a context of this project")
    try:
        values = json.loads(text)
        version = values.get("format_version") if isinstance(values, dict) else None
        if version != FORMAT_VERSION:
            raise ContextError(f"{path}: format_version {version!r}; this version reads {FORMAT_VERSION}")
        return Manifest.model_validate(values)
    except (ValidationError, ValueError) as error:
        if isinstance(error, ContextError):
            raise
        raise ContextError(f"{path}: its manifest is damaged ({str(error).splitlines()[0]})") from None
