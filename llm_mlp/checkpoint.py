"""A checkpoint is a folder: config.json, tokenizer.json, model.safetensors. Nothing is pickled.

What many processes train has its weights in ``shards/`` instead of model.safetensors: safetensors files too, each with
some rows of each tensor, as torch's distributed checkpointing lays them out.

Folders are written under a temporary name and renamed when complete: a full disk or a killed process leaves the
previous checkpoint as it was.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from llm_mlp.config import ConfigError, ModelConfig, build
from llm_mlp.data.tokenizer import Tokenizer
from llm_mlp.models import LM
from llm_mlp.models.mixer import STATES
from llm_mlp.weights import WEIGHTS, activations, hold

log = logging.getLogger("llm_mlp.checkpoint")

FORMAT_VERSION = 1
SHARDS = "shards"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used or written; the message names the file and says what to do."""


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Make ``folder`` with what ``fill(temporary)`` writes; it appears whole or not at all.

    Raises:
        CheckpointError: it could not be written (a full disk, no permission); an earlier ``folder`` still stands.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        fill(temporary)
        for path in temporary.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        if folder.exists():
            os.rename(folder, old)
        os.rename(temporary, folder)
    except (OSError, SafetensorError) as error:
        if old.exists() and not folder.exists():
            os.rename(old, folder)
        raise CheckpointError(
            f"{folder}: could not be saved ({error}); free some space or choose another folder. "
            "Checkpoints saved before are untouched"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf8")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object with a ``format_version`` this code knows.

    Raises:
        CheckpointError: missing, not JSON, or of another format.
    """
    try:
        value = json.loads(path.read_text(encoding="utf8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; {path.parent} is not a complete checkpoint") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from None
    version = value.get("format_version") if isinstance(value, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format_version {version!r}; this version reads {FORMAT_VERSION}")
    return value


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        CheckpointError: missing, truncated or not safetensors.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; {path.parent} is not a complete checkpoint")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: truncated or not a safetensors file ({error})") from None


def shards_in(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of the tensors that ``folder`` holds all shards of, by name.

    Raises:
        CheckpointError: missing, truncated, not safetensors, or without some of a tensor's rows.
    """
    import torch.distributed.checkpoint as dcp  # here: it takes half as long as torch, and few checkpoints need it

    if not folder.is_dir():
        raise CheckpointError(f"{folder}: missing; {folder.parent} is not a complete checkpoint")
    try:
        stored = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise CheckpointError(f"{folder}: truncated or not safetensors files ({error})") from None
    found = {}
    for name, tensor in stored.items():
        assert isinstance(tensor, dcp.metadata.TensorStorageMetadata)
        if sum(math.prod(chunk.sizes) for chunk in tensor.chunks) != math.prod(tensor.size):
            raise CheckpointError(f"{folder}: tensor {name!r} is missing some of its rows; a file was lost")
        found[name] = tensor.size, tensor.properties.dtype
    return found


def read_shards(folder: Path, into: dict[str, Tensor], *, together: bool) -> None:
    """Fill tensors, which may be sharded over processes, from the shards of that name; ``together``: by all at once.

    Raises:
        CheckpointError: as `shards_in`, or another shape.
    """
    import torch.distributed.checkpoint as dcp

    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it should be
            warnings.filterwarnings("ignore", message="Detected mismatched keys")  # of stages: as they should be
            dcp.load(into, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=not together)
    except (dcp.CheckpointException, SafetensorError, OSError, ValueError, RuntimeError) as error:
        last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise CheckpointError(f"{folder}: cannot be read ({last[:300]})") from None


def write_model(
    folder: Path,
    model: LM,
    tokenizer: Tokenizer | None,
    *,
    weights: bool = True,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """config.json, tokenizer.json and, with ``weights``, model.safetensors into an existing folder.

    ``tensors``: weights to write instead of the model's own.

    Raises:
        CheckpointError: the model is quantised; what it was made of is the checkpoint.
    """
    if weights and tensors is None and model.quantization != "none":
        raise CheckpointError(f"{folder}: {model.quantization} weights are not saved; copy the checkpoint they are of")
    config = {
        "format_version": FORMAT_VERSION,
        "model_type": "llm-mlp",
        "tokenizer": tokenizer.fingerprint() if tokenizer else None,
        "model": model.config.model_dump(mode="json"),
    }
    write_json(folder / "config.json", config)
    if tokenizer is not None:
        tokenizer.save(folder)
    if weights:
        found = model.state_dict() if tensors is None else tensors
        found = {name: t.detach().contiguous().cpu() for name, t in found.items()}
        save_file(found, folder / "model.safetensors", metadata={"format_version": str(FORMAT_VERSION)})


def save_model(
    folder: str | Path, model: LM, tokenizer: Tokenizer | None, tensors: Mapping[str, Tensor] | None = None
) -> None:
    """Write a checkpoint of the model alone, atomically; ``tensors`` as in `write_model`."""
    write_folder(Path(folder), lambda temporary: write_model(temporary, model, tokenizer, tensors=tensors))


def resolve(path: str | Path) -> Path:
    """The checkpoint folder that ``path`` means: itself, or the ``model`` folder of a run."""
    folder = Path(path)
    if (folder / "config.json").is_file():
        return folder
    if (folder / "model" / "config.json").is_file():
        return folder / "model"
    if not folder.exists():
        raise CheckpointError(f"{folder}: no such folder")
    raise CheckpointError(f"{folder}: no config.json here or in {folder / 'model'}; not a checkpoint or a finished run")


def read_config(folder: str | Path) -> ModelConfig:
    path = resolve(folder) / "config.json"
    values = read_json(path)
    if not isinstance(values.get("model"), dict):
        raise CheckpointError(f"{path}: no 'model' section; not a checkpoint of this project")
    try:
        return build(ModelConfig, values["model"], str(path))
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


@contextlib.contextmanager
def _weights(folder: Path) -> Iterator[tuple[Path, set[str], Callable[[str], Tensor]]]:
    """Where a checkpoint's weights are, their names, and what reads one of them, whole."""
    path = folder / "model.safetensors"
    if (folder / SHARDS).is_dir():
        path = folder / SHARDS
        shapes = {name: t for name, t in shards_in(path).items() if name.startswith("model/")}
        found = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in shapes.items()}
        read_shards(path, found, together=False)
        yield path, {name.removeprefix("model/") for name in found}, lambda name: found[f"model/{name}"]
        return
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; {folder} is not a complete checkpoint")
    try:
        with safe_open(path, framework="pt") as file:
            yield path, set(file.keys()), file.get_tensor
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: truncated or not a safetensors file ({error})") from None


def load_weights(
    model: LM,
    folder: Path,
    into: Callable[[str, Tensor, Tensor], Tensor] | None = None,
    elsewhere: Collection[str] = (),
) -> None:
    """Fill ``model`` from a checkpoint folder; every tensor must be there, none else, each of the right shape.

    ``into(name, stored, own)``: what of a stored tensor the model's own takes, where that is a part of it.
    ``elsewhere``: names of tensors that other processes hold.
    """
    own = model.state_dict()
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in LM(model.config).state_dict().items()}
    with _weights(folder) as (path, names, read), torch.no_grad():
        if missing := sorted(own.keys() - names):
            raise CheckpointError(f"{path}: tensor {missing[0]!r} is missing ({len(missing)} in all)")
        if foreign := sorted(names - own.keys() - set(elsewhere)):
            raise CheckpointError(f"{path}: tensor {foreign[0]!r} does not belong to this model ({len(foreign)})")
        for name, tensor in own.items():
            stored = read(name)
            if stored.shape != shapes[name]:
                raise CheckpointError(
                    f"{path}: tensor {name!r} has shape {tuple(stored.shape)}, the config says {tuple(shapes[name])}"
                )
            tensor.copy_(stored if into is None else into(name, stored.to(tensor.device), tensor))


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The checkpoint's tokenizer, checked against the one the model was trained with."""
    folder = resolve(folder)
    tokenizer = Tokenizer.load(folder)
    config = read_json(folder / "config.json")
    if config.get("tokenizer") not in (None, tokenizer.fingerprint()):
        raise CheckpointError(
            f"{folder / 'tokenizer.json'}: not the tokenizer this model was trained with; restore the original file"
        )
    vocabulary = read_config(folder).vocab_size
    if tokenizer.vocab_size > vocabulary:
        raise CheckpointError(
            f"{folder / 'tokenizer.json'}: {tokenizer.vocab_size} tokens, but the model knows {vocabulary}"
        )
    return tokenizer


def load_model(
    folder: str | Path, *, device: torch.device | str = "cpu", weights: str = "fp32", state: str = "auto"
) -> tuple[LM, Tokenizer]:
    """Model (in eval mode) and tokenizer of a checkpoint folder or a finished run.

    Args:
        weights: what they are held in, of `llm_mlp.weights.WEIGHTS`. state: what states are kept in, of
            `llm_mlp.models.mixer.STATES`.

    Raises:
        CheckpointError, TokenizerError: naming the file. ValueError: unknown ``weights`` or ``state``.
    """
    for name, value, known in (("weights", weights, WEIGHTS), ("state", state, STATES)):
        if value not in known:
            raise ValueError(f"{name} {value!r}: expected {', '.join(known)}")
    folder = resolve(folder)
    with torch.device("meta"):
        model = LM(read_config(folder))
    model = model.to_empty(device="cpu")
    load_weights(model, folder)
    tokenizer = load_tokenizer(folder)
    model = model.to(device=device, dtype=activations(weights)).eval()
    if state.startswith("bf16") and torch.device(device).type == "cpu":
        log.info("state %s: on a CPU this saves bytes, not time (it is widened for every step)", state)
    return hold(model, weights).keep_state(state), tokenizer
