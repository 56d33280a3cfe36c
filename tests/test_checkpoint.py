"""Checkpoints: folders that are whole or not there, and errors that name the file."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from model_cases import SMALL
from safetensors.torch import save_file

from llm_mlp import checkpoint
from llm_mlp.checkpoint import CheckpointError, load_model, read_tensors, resolve, save_model, write_folder
from llm_mlp.config import ModelConfig, build
from llm_mlp.data import Tokenizer
from llm_mlp.models import LM, build_model


@pytest.fixture
def model() -> LM:
    return build_model(build(ModelConfig, {**SMALL, "vocab_size": 257})).randomize_()


@pytest.fixture
def folder(tmp_path: Path, model: LM) -> Path:
    save_model(tmp_path / "model", model, Tokenizer.bytes())
    return tmp_path / "model"


def test_what_is_saved_is_loaded(folder, model):
    loaded, tokenizer = load_model(folder)
    assert loaded.config == model.config and not loaded.training
    assert tokenizer.fingerprint() == Tokenizer.bytes().fingerprint()
    for name, t in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], t), name
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(p.name for p in folder.parent.iterdir()) == ["model"]


def test_dtype_on_loading(folder):
    loaded, _ = load_model(folder, weights="bf16")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


def test_a_run_stands_for_its_model(folder):
    assert resolve(folder.parent) == folder == resolve(folder)
    with pytest.raises(CheckpointError, match="no such folder"):
        resolve(folder / "nowhere")
    (folder.parent / "empty").mkdir()
    with pytest.raises(CheckpointError, match="not a checkpoint or a finished run"):
        resolve(folder.parent / "empty")


def changed(folder: Path, change) -> None:
    tensors = read_tensors(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("blocks.0.ffn.up.weight"), r"tensor 'blocks\.0\.ffn\.up\.weight' is missing \(1 in all\)"),
        (lambda t: t.update(more=torch.zeros(1)), "tensor 'more' does not belong to this model"),
        (lambda t: t.update({"head.weight": torch.zeros(3, 3)}), r"'head\.weight' has shape \(3, 3\), the config says"),
    ],
)
def test_tensors_that_do_not_fit(folder, change, says):
    changed(folder, change)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: .*{says}"):
        load_model(folder)


@pytest.mark.parametrize("keep", [0, 4, 200, -50])
def test_a_truncated_file(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated or not a safetensors file"):
        load_model(folder)


def test_a_pickle_is_not_read(folder):
    torch.save({"a": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load_model(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file(folder, name):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        load_model(folder)


def edited(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_config_of_another_kind(folder):
    edited(folder, format_version=99)
    with pytest.raises(CheckpointError, match="format_version 99; this version reads 1"):
        load_model(folder)
    edited(folder, format_version=1, model={**SMALL, "vocab_size": 257, "n_layer": 2})
    with pytest.raises(CheckpointError, match=r"config\.json: n_layer: unknown field; did you mean 'n_layers'"):
        load_model(folder)
    edited(folder, model="mine")
    with pytest.raises(CheckpointError, match="no 'model' section"):
        load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: not JSON"):
        load_model(folder)


def test_another_tokenizer(folder):
    Tokenizer.train(["some other text " * 20], 270).save(folder)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not the tokenizer this model was trained with"):
        load_model(folder)
    edited(folder, tokenizer=None)
    with pytest.raises(CheckpointError, match=r"270 tokens, but the model knows 257|26\d tokens, but the model knows"):
        load_model(folder)


@pytest.mark.parametrize("stage", ["write_json", "save_file", "fsync", "rename"])
def test_a_full_disk_leaves_the_old_checkpoint(folder, model, monkeypatch, stage):
    old = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    owner = checkpoint.os if stage in ("fsync", "rename") else checkpoint
    monkeypatch.setattr(owner, stage, full)
    with pytest.raises(CheckpointError, match=r"could not be saved \(.*No space left on device\).*untouched"):
        save_model(folder, model.randomize_(1), Tokenizer.bytes())
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == old
    assert sorted(p.name for p in folder.parent.iterdir()) == ["model"]
    load_model(folder)


def test_the_second_rename_fails(folder, monkeypatch):
    real, calls = checkpoint.os.rename, []

    def second_fails(a, b):
        calls.append(a)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        real(a, b)

    monkeypatch.setattr(checkpoint.os, "rename", second_fails)
    with pytest.raises(CheckpointError, match="could not be saved"):
        write_folder(folder, lambda temporary: (temporary / "config.json").write_text("{}"))
    load_model(folder)
