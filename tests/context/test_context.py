"""Contexts: what is restored is what was saved, to the bit; nothing is lost, nothing foreign or damaged is taken."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from model_cases import random_model
from safetensors.torch import load_file, save_file

from llm_mlp.context import Context, ContextError, Loaded, Reader, StorageError, Store, compose, describe, diff
from llm_mlp.context import format as files
from llm_mlp.context.store import examine
from llm_mlp.infer import Sampling, generate
from llm_mlp.ops.memorise.units import raw

TEXT = [(7 * i * i + 3 * i) % 31 for i in range(90)]


def reader_of(case: str = "plain", **more) -> Reader:
    return Reader(random_model(case, **more), None)


@pytest.fixture(scope="module")
def reader() -> Reader:
    return reader_of()


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


def same(a: Context, b: Context) -> None:
    assert a.manifest == b.manifest and torch.equal(a.tokens, b.tokens) and torch.equal(a.logits, b.logits)
    assert a.state.keys() == b.state.keys()
    assert all(torch.equal(t, b.state[name]) and t.dtype == b.state[name].dtype for name, t in a.state.items())


def greedy(reader: Reader, context: Context, prompt=(1, 2, 3)) -> list[int]:
    return list(generate(reader.model, prompt, max_tokens=12, sampling=Sampling(0), start=context.start))


# -- the file ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["plain", "attention", "hybrid", "softmax-read", "fast-weights-only", "routing"])
def test_restored_is_saved_to_the_bit(case, tmp_path):
    reader = reader_of(case)
    made = reader.create(TEXT)
    made.save(tmp_path / "c.safetensors")
    restored = reader.adopt(Context.load(tmp_path / "c.safetensors"))
    same(made, restored)
    assert greedy(reader, restored) == greedy(reader, made)
    # And it is what reading everything at once gives.
    whole = list(generate(reader.model, [*TEXT, 1, 2, 3], max_tokens=12, sampling=Sampling(0)))
    assert greedy(reader, restored) == whole
    same(made, restored)  # asking changes nothing


def test_reading_on_is_reading_at_once(reader):
    whole = reader.create(TEXT)
    parts = reader.append(reader.append(reader.create(TEXT[:20]), TEXT[20:21]), TEXT[21:])
    assert torch.equal(parts.tokens, whole.tokens) and parts.manifest.text == whole.manifest.text
    assert parts.manifest.marks == [20, 21, 90] and whole.manifest.marks == [90]
    assert (parts.logits - whole.logits).abs().max() < 1e-4


def test_a_text_in_pieces_is_bit_equal(reader, monkeypatch):
    """Pieces end at multiples from the start of the text: interrupted or not, the same products are computed."""
    monkeypatch.setattr("llm_mlp.infer.prefill.PREFILL", 16)
    monkeypatch.setattr("llm_mlp.context.context.PREFILL", 16)
    whole = reader.create(TEXT)
    made = list(reader.pieces(None, torch.tensor(TEXT), every=20))
    assert [len(c.tokens) for c in made] == [32, 64, 90] and [c.manifest.marks for c in made] == [[], [], [90]]
    again = list(reader.pieces(made[0], torch.tensor(TEXT), every=20))
    for c in (made[-1], again[-1]):
        assert torch.equal(c.logits, whole.logits)
        assert all(torch.equal(t, whole.state[name]) for name, t in c.state.items())
    with pytest.raises(ContextError, match="of another text"):
        list(reader.pieces(made[0], torch.tensor([5, *TEXT]), every=20))


@pytest.mark.parametrize("damage", ["cut", "flipped", "manifest", "foreign", "empty"])
def test_damaged_files_are_refused(reader, tmp_path, damage):
    path = tmp_path / "c.safetensors"
    reader.create(TEXT).save(path)
    data = path.read_bytes()
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        path.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
    elif damage == "manifest":
        path.write_bytes(data.replace(b'\\"tokens\\":90', b'\\"tokens\\":91'))
        assert path.read_bytes() != data
    elif damage == "foreign":
        save_file({"x": torch.zeros(3)}, path)
    else:
        path.write_bytes(b"")
    says = {"flipped": "altered", "manifest": "altered", "foreign": "no manifest"}.get(damage, "truncated or not")
    with pytest.raises(ContextError, match=f"c.safetensors: .*{says}"):
        Context.load(path)


def test_files_from_before_a_field_are_read(reader, tmp_path):
    """Their manifests lack it, and their digests do not cover it."""
    made = reader.create(TEXT)
    made.save(tmp_path / "c.safetensors")
    data = (tmp_path / "c.safetensors").read_bytes()
    old = data.replace(b'\\"pieces\\":null,', b"")
    size = int.from_bytes(old[:8], "little") - (len(data) - len(old))
    (tmp_path / "old.safetensors").write_bytes(size.to_bytes(8, "little") + old[8:])
    assert len(old) < len(data)
    same(Context.load(tmp_path / "old.safetensors"), made)


def test_another_format_is_refused(reader, tmp_path):
    made = reader.create(TEXT)
    files.write(tmp_path / "c.safetensors", made.manifest.model_copy(update={"format_version": 2}), made.tensors())
    with pytest.raises(ContextError, match="format_version 2; this version reads 1"):
        Context.load(tmp_path / "c.safetensors")


def test_another_model_is_refused(reader, caplog):
    made = reader.create(TEXT)
    other = reader_of(seed=1)
    for act in (other.adopt, lambda c: other.append(c, [1])):
        with pytest.raises(ContextError, match="made with another weight"):
            act(made)
    with pytest.raises(ContextError, match="made with another config"):
        reader_of("softmax-read").adopt(made)
    elsewhere = Context(made.manifest.model_copy(update={"device": "NVIDIA X"}), made.tokens, made.state, made.logits)
    reader.adopt(elsewhere)
    assert "was made on NVIDIA X" in caplog.text and "not to the bit" in caplog.text


def test_a_full_disk_loses_nothing(reader, store, monkeypatch):
    first = reader.create(TEXT[:20])
    store.commit(first, "book")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(files, "save_file", full)
        with pytest.raises(StorageError, match="No space left on device.*untouched"):
            store.commit(reader.append(first, TEXT[20:]), "book")
    same(Store(store.folder).get("book"), first)
    assert not list(store.folder.rglob("*.tmp"))


# -- the store -----------------------------------------------------------------------------------------------------


def test_names_forks_and_versions(reader, store):
    first = reader.create(TEXT[:20])
    store.commit(first, "book")
    second = reader.append(first, TEXT[20:40])
    store.commit(second, "book")
    fork = store.fork("book", "other")
    assert fork.id == second.id and store.usage()["objects"] == 2  # nothing was copied
    third = reader.append(second, TEXT[40:])
    store.commit(third, "other")
    fresh = Store(store.folder)
    same(fresh.get("book", reader), second)
    same(fresh.get("other", reader), third)
    assert [e.name for e in fresh.entries()] == ["book", "other"]
    for bad in ("book", "other"):
        with pytest.raises(ContextError, match="exists"):
            fresh.fork("book", bad)
    with pytest.raises(ContextError, match="means another text"):
        fresh.commit(first, "other")
    with pytest.raises(ContextError, match="does not exist.*book, other"):
        fresh.get("books")
    for bad in ("../x", "a/b", "", ".hidden", "x" * 200, "a b", "con\n"):
        with pytest.raises(ContextError, match="is no name"):
            fresh.commit(first, bad)
    assert store.undo("other", reader).id == second.id
    assert store.undo("other", reader).id == first.id
    with pytest.raises(ContextError, match="0 marks to go back to"):
        store.undo("other", reader)
    same(store.get("book", reader), second)  # a fork goes its own way
    store.remove("other")
    assert store.usage()["objects"] == 2
    store.remove("book")
    assert store.usage()["objects"] == 0 and not store.entries()
    with pytest.raises(ContextError, match="does not exist"):
        store.remove("book")


def test_undo_without_the_earlier_version_reads_again(reader, store):
    first = reader.create(TEXT[:20])
    second = reader.append(first, TEXT[20:40])
    third = reader.append(second, TEXT[40:])
    for c in (first, second, third):
        store.commit(c, "book")
    os.remove(store.folder / "objects" / f"{second.id}.safetensors")
    fresh = Store(store.folder)
    made = fresh.undo("book", reader)
    assert made.manifest.replayed and made.manifest.marks == [20, 40] and made.manifest.text == second.manifest.text
    assert (made.logits - second.logits).abs().max() < 1e-4
    same(fresh.get("book"), made)
    with pytest.raises(ContextError, match="no mark at 25 tokens; the last ones: 20"):
        fresh.undo("book", reader, tokens=25)
    assert fresh.undo("book", reader, tokens=20).id == first.id


def test_bytes_are_bounded(reader, tmp_path):
    made = [reader.create(TEXT[: 20 + i]) for i in range(6)]
    size = max(c.bytes for c in made) + 4096  # with the header
    store = Store(tmp_path / "s", disk_bytes=3 * size, snapshot_bytes=size, loaded=Loaded(2 * made[0].bytes + 100))
    for i, c in enumerate(made):  # without names: the oldest go
        store.commit(c)
        os.utime(store.folder / "objects" / f"{c.id}.safetensors", (i, i))
    assert {p.stem for p in (store.folder / "objects").iterdir()} <= {c.id for c in made[-3:]}
    assert store.usage()["ram_contexts"] <= 2 and store.usage()["ram_bytes"] <= 2 * made[0].bytes + 100
    store.gc()
    version = made[0]
    store.commit(version, "book")
    for i in range(4):  # earlier versions keep to their budget, the newest stays
        version = reader.append(version, [i])
        store.commit(version, "book")
    usage = store.usage()
    assert usage["snapshot_bytes"] <= size and usage["disk_bytes"] <= 3 * size
    same(store.get("book"), version)
    store.commit(made[1], "second")
    with pytest.raises(StorageError, match="no room for .* bytes more"):
        for i in (2, 3):
            store.commit(made[i], f"more{i}")
    same(Store(store.folder).get("book"), version)


def test_expiry_and_leftovers(reader, store):
    store.commit(reader.create(TEXT[:20]), "soon", expires=timedelta(seconds=-1))
    store.commit(reader.create(TEXT[:21]), "kept", expires=timedelta(hours=1))
    left = store.folder / "objects" / ".x.tmp"
    left.write_bytes(b"1")
    os.utime(left, (1, 1))
    assert [e.name for e in store.entries()] == ["kept"]
    with pytest.raises(ContextError, match="has expired"):
        store.get("soon")
    done = store.gc()
    assert (done["names"], done["objects"], done["temporary"]) == (1, 1, 1) and not left.exists()
    store.commit(reader.create(TEXT[:22]), "soon")  # the name is free again


def test_export_and_import(reader, store, tmp_path):
    made = reader.create(TEXT)
    store.commit(made, "book")
    store.export("book", tmp_path / "shared.safetensors")
    assert "tokens" in load_file(tmp_path / "shared.safetensors")
    other = Store(tmp_path / "elsewhere")
    same(other.import_(tmp_path / "shared.safetensors", "mine"), made)
    assert greedy(reader, other.get("mine", reader)) == greedy(reader, made)
    (tmp_path / "bad.safetensors").write_bytes((tmp_path / "shared.safetensors").read_bytes()[:-9])
    with pytest.raises(ContextError, match="truncated"):
        other.import_(tmp_path / "bad.safetensors", "bad")
    assert [e.name for e in other.entries()] == ["mine"]


def test_the_longest_stored_beginning_is_found_and_the_reason_said(reader, store):
    assert store.find(TEXT, reader).reason == "miss: nothing is stored"
    for n in (10, 40, 60):
        store.commit(reader.create(TEXT[:n]))
    found = store.find(TEXT[:50], reader)
    assert found.cached_tokens == 40 and found.context is not None
    assert found.reason == f"hit: 40 of 50 tokens from {found.context.id}"
    prompt = TEXT[40:50]
    whole = list(generate(reader.model, TEXT[:50], max_tokens=12, sampling=Sampling(0)))
    assert greedy(reader, found.context, prompt) == whole
    assert store.find(TEXT[:60], reader).cached_tokens == 60  # all of it: not a token is read
    assert store.find([5, *TEXT], reader).reason == "miss: none of 3 stored texts begins this prompt"
    assert "none of 3 stored contexts is of this model" in store.find(TEXT, reader_of(seed=1)).reason
    path = store.folder / "objects" / f"{found.context.id}.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    fresh = Store(store.folder)
    assert fresh.find(TEXT[:50], reader).cached_tokens == 10  # the next longest


def test_a_damaged_name_is_named(reader, store):
    store.commit(reader.create(TEXT), "book")
    (store.folder / "names" / "book.json").write_text("{")
    with pytest.raises(ContextError, match=r"book.json: damaged.*restore or remove that file"):
        store.get("book")
    other = reader.create(TEXT[:30])
    store.commit(other, "other")  # the others go on
    for bad in ({"expires": 5}, {"expires": "2030-01-01"}, {"history": [[1]]}, {"history": "abc"}, {"id": 5}):
        row = json.loads((store.folder / "names" / "other.json").read_text()) | bad
        (store.folder / "names" / "book.json").write_text(json.dumps(row))
        assert [e.name for e in store.entries()] == ["other"]
    assert store.gc()["objects"] == 0  # nobody knows what the damaged name needs
    same(store.get("other"), other)


def test_undo_beside_another_process(reader, store, monkeypatch):
    first = reader.create(TEXT[:20])
    second = reader.append(first, TEXT[20:40])
    for c in (first, second):
        store.commit(c, "book")
    load = Store._load

    def meanwhile(self, *args):
        monkeypatch.setattr(Store, "_load", load)
        Store(store.folder).commit(reader.append(second, [1]), "book")
        return load(self, *args)

    monkeypatch.setattr(Store, "_load", meanwhile)
    with pytest.raises(ContextError, match="changed by another process meanwhile"):
        store.undo("book", reader)
    assert store.get("book").manifest.parent == second.id


def test_a_good_copy_replaces_a_damaged_object(reader, store, tmp_path):
    made = reader.create(TEXT)
    store.commit(made, "book")
    store.export("book", tmp_path / "copy.safetensors")
    path = store.folder / "objects" / f"{made.id}.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    fresh = Store(store.folder)
    fresh.import_(tmp_path / "copy.safetensors", "again")
    same(Store(store.folder).get("book", reader), made)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"layers.0.fast_weights": torch.zeros(1, 2)}, "fast_weights has shape"),
        ({"layers.0.odd": torch.zeros(1)}, "part layers.0.odd of the state"),
        ("logits", "logits has shape"),
        ("tokens", "token ids outside the model's vocabulary"),
    ],
)
def test_what_does_not_fit_is_refused(reader, change, says):
    made = reader.create(TEXT)
    state, logits, tokens = dict(made.state), made.logits, made.tokens
    if change == "logits":
        logits = logits[:, :9]
    elif change == "tokens":
        tokens = tokens + 10**6
    else:
        state |= change
    with pytest.raises(ContextError, match=says):
        reader.adopt(Context(made.manifest, tokens, state, logits))


KILLED = """
import sys
sys.path[:0] = {paths!r}
from model_cases import random_model
from llm_mlp.context import Reader, Store
reader, store = Reader(random_model("plain"), None), Store({folder!r})
context = store.get("book", reader)
while True:
    context = reader.append(context, [len(context.tokens) % 31])
    store.commit(context, "book")
    print(len(context.tokens), flush=True)
"""


@pytest.mark.slow
def test_kill_9_at_any_moment_loses_no_committed_context(reader, tmp_path):
    folder = tmp_path / "store"
    Store(folder).commit(reader.create(TEXT[:5]), "book")
    code = KILLED.format(paths=[p for p in sys.path if p], folder=str(folder))
    chance, last = random.Random(0), 5
    for _ in range(6):
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=Path.cwd())
        assert child.stdout is not None
        child.stdout.readline()  # it is at work
        time.sleep(chance.random() / 2)
        os.kill(child.pid, signal.SIGKILL)
        lines = child.stdout.read().split()
        child.wait()
        committed = int(lines[-1]) if lines else last + 1
        store = Store(folder, loaded=Loaded(0))
        found = store.get("book", reader)  # whole and of this model, digest and all
        assert committed <= len(found.tokens) <= committed + 1
        assert all(Context.load(p).id == p.stem for p in (folder / "objects").glob("[!.]*.safetensors"))
        last = len(found.tokens)
    assert last > 12


# -- looking -------------------------------------------------------------------------------------------------------


def test_describe_and_diff(reader):
    a, b = reader.create(TEXT[:60]), reader.create([*TEXT[:50], 9, 9, 9])
    found = describe(a, reader.model)
    json.dumps(found)
    layer = found["layers"][0]
    units = a.state["layers.0.units.scores"]
    assert layer["units"] == units[0].numel() and layer["units_used"] == int((units > -torch.inf).sum())
    assert layer["fast_weight_norm"] == pytest.approx(float(a.state["layers.0.fast_weights"].norm()), abs=1e-3)
    assert len(layer["half_lives"]) == len(layer["head_norms"]) == reader.model.config.perception.heads
    change = diff(a, b)
    json.dumps(change)
    assert change["common_tokens"] == 50 and change["tokens"] == [60, 53] and change["same_weights"]
    assert change["layers"][0]["fast_weight_distance"] > 0
    alike = diff(a, a)
    assert alike["common_tokens"] == 60 and alike["layers"][0]["fast_weight_distance"] == 0
    assert alike["layers"][0]["units_shared"] == layer["units_used"]


# -- settings ------------------------------------------------------------------------------------------------------


def held(weights: str = "bf16", state: str = "auto") -> Reader:
    from llm_mlp.config import ModelConfig, build
    from llm_mlp.models import build_model
    from llm_mlp.weights import hold

    config = build(ModelConfig, {"preset": "demo", "n_layers": 1, "vocab_size": 128})
    return Reader(hold(build_model(config).randomize_(), weights).keep_state(state), None, transitions=True)


def test_contexts_of_8_bits_are_kept_to_the_bit(tmp_path):
    reader = held("int8", "bf16+8bit")
    made = reader.create(TEXT)
    assert made.manifest.quantization == "int8" and made.manifest.dtypes["keys"] == "float8_e4m3fn"
    made.save(tmp_path / "c.safetensors")
    restored = reader.adopt(examine(tmp_path / "c.safetensors", reader))
    assert restored.manifest == made.manifest
    assert all(torch.equal(raw(t), raw(restored.state[name])) for name, t in made.state.items())
    assert greedy(reader, restored) == greedy(reader, made)
    assert describe(restored)["layers"] and diff(made, restored)["layers"][0]["fast_weight_distance"] == 0
    both = compose(reader, [made, reader.create(TEXT[:40])], [0])
    assert both.manifest.dtypes == made.manifest.dtypes and both.logits.isfinite().all()


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (("int8", "auto"), "made with weights in full, this model has int8 weights; load it with the --weights"),
        (("bf16", "bf16+bf16"), "keeps its fast_weights in float32, this model in bfloat16; load it with the --state"),
        (("bf16", "bf16+8bit"), "keeps its fast_weights in float32, this model in bfloat16"),
    ],
)
def test_contexts_of_other_settings_are_refused(other, says, tmp_path):
    made, reader = held().create(TEXT), held(*other)
    for use in (reader.adopt, lambda c: reader.append(c, [1, 2])):
        with pytest.raises(ContextError, match=says):
            use(made)
    with pytest.raises(ContextError, match="this model has weights in full" if other[0] == "int8" else "keeps its"):
        held().adopt(reader.create(TEXT))
    store = Store(tmp_path)
    store.commit(made, "text")
    found = store.find(TEXT + [5], reader)
    assert found.context is None and ("none of 1 stored contexts" in found.reason or says in found.reason)
