"""Tokenised caches: made once, split by document, and never trusted when something changed."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest

import llm_mlp.data.shards as module
from llm_mlp.config import DataConfig, SourceConfig
from llm_mlp.data import DataError, Dataset, Tokenizer, prepare, read_documents

TEXTS = [f"Document {i}: the {i * i}th é story, {'word ' * (i % 17)}😀 end." for i in range(60)]


def write(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    path = write(tmp_path / "a.jsonl", TEXTS)
    return DataConfig(
        sources=(SourceConfig(path=str(path)),),
        tokenizer="byte",
        held_out=0.2,
        cache_dir=str(tmp_path / "cache"),
    )


def with_(config: DataConfig, **values: object) -> DataConfig:
    return config.model_copy(update=values)


def open_(config: DataConfig, tokenizer: Tokenizer | None = None) -> Dataset:
    return prepare(config, tokenizer=tokenizer, progress=False)


def texts_of(dataset: Dataset, split: str) -> list[list[str]]:
    return [
        [dataset.tokenizer.decode(data.document(i)) for i in range(data.documents)] for data in getattr(dataset, split)
    ]


def all_texts(dataset: Dataset) -> list[str]:
    return [text for split in ("train", "held_out") for texts in texts_of(dataset, split) for text in texts]


@pytest.fixture
def no_tokenising(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """After this, encoding a document fails the test."""

    def fail(*args: object) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(Tokenizer, "encode_batch", fail)
    monkeypatch.setattr(Tokenizer, "train", fail)
    return monkeypatch


def test_documents_come_back(config: DataConfig, tmp_path: Path) -> None:
    dataset = open_(config)
    train, held_out = texts_of(dataset, "train")[0], texts_of(dataset, "held_out")[0]
    assert sorted(train + held_out) == sorted(TEXTS)
    assert 3 <= len(held_out) <= 25
    data = dataset.train[0]
    assert data.tokens.dtype == np.uint16 and data.offsets.dtype == np.int64 and data.offsets[0] == 0
    assert isinstance(data.tokens, np.memmap)
    assert data.bytes == sum(len(text.encode()) for text in train)
    assert dataset.tokenizer.eos not in data.tokens
    number = {f"{tmp_path}/a.jsonl:{i + 1}": text for i, text in enumerate(TEXTS)}
    assert [number[name] for name in data.doc_ids] == train
    described = dataset.describe()
    assert described["train_tokens"] == len(data.tokens) and described["sources"][0]["train"]["documents"] == len(train)
    json.dumps(described)


def test_large_vocabulary_is_uint32(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.bytes()
    tokenizer.vocab_size = 70_000
    monkeypatch.setattr(Tokenizer, "load", lambda path: tokenizer)
    dataset = open_(config, tokenizer)
    assert dataset.train[0].tokens.dtype == np.uint32
    tokenizer.vocab_size = 257
    assert sorted(all_texts(dataset)) == sorted(TEXTS)


def test_split_depends_on_the_text_alone(config: DataConfig, tmp_path: Path) -> None:
    held_out = set(texts_of(open_(config), "held_out")[0])
    write(tmp_path / "a.jsonl", [*reversed(TEXTS), "one more"])
    assert set(texts_of(open_(config), "held_out")[0]) - {"one more"} == held_out


def test_the_same_text_is_never_on_both_sides(config: DataConfig, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", TEXTS + TEXTS[::-1])
    dataset = open_(config)
    assert not set(texts_of(dataset, "train")[0]) & set(texts_of(dataset, "held_out")[0])


def test_one_document_is_held_out_at_least(config: DataConfig, tmp_path: Path) -> None:
    for texts in (TEXTS[:2], TEXTS[:5]):
        write(tmp_path / "a.jsonl", texts)
        dataset = open_(with_(config, held_out=1e-9))
        assert (dataset.held_out[0].documents, dataset.train[0].documents) == (1, len(texts) - 1)
        expected = min(texts, key=lambda text: module._text_hash(text.encode()))
        assert texts_of(dataset, "held_out") == [[expected]]
    assert open_(with_(config, held_out=0.0)).held_out[0].documents == 0


def test_the_only_document_of_a_source_stays_in_training(
    config: DataConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ordered = sorted(TEXTS, key=lambda text: module._text_hash(text.encode()))
    one, two = write(tmp_path / "one.jsonl", ordered[:1]), write(tmp_path / "two.jsonl", ordered[1:4])
    sources = (SourceConfig(path=str(one)), SourceConfig(path=str(two)))
    dataset = open_(with_(config, sources=sources, held_out=1e-9))
    assert texts_of(dataset, "held_out") == [[], [ordered[1]]]
    alone = open_(with_(config, sources=sources[:1], held_out=1e-9))
    assert alone.held_out[0].documents == 0
    assert "nothing is held out" in caplog.text


def test_nothing_left_to_train_on(config: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl: all 60 documents fall to the held-out part.*held_out"):
        open_(with_(config, held_out=0.9999999))
    assert not list((tmp_path / "cache").glob("*")), "nothing half-written stays"


@pytest.mark.parametrize("copies", [1, 3])
def test_a_single_document_is_trained_on(config: DataConfig, tmp_path: Path, copies: int, caplog) -> None:
    """Whatever its hash: no share of one document can be held out."""
    path = write(tmp_path / "one.jsonl", ["the only document there is"] * copies)
    found = open_(with_(config, sources=(SourceConfig(path=str(path)),), held_out=0.9))
    assert found.train[0].documents == copies and found.held_out[0].documents == 0
    assert "nothing is held out" in caplog.text
    # Beside another source, the other one's documents are held out.
    both = open_(with_(config, sources=(*config.sources, SourceConfig(path=str(path))), held_out=0.3))
    assert both.held_out[0].documents > 0 and both.held_out[1].documents == 0


def test_reopened_without_tokenising(config: DataConfig, no_tokenising: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match="tokenised again"):
        open_(config)
    no_tokenising.undo()
    first = open_(config)
    no_tokenising.setattr(Tokenizer, "encode_batch", None)
    no_tokenising.setattr(module, "read_documents", None)
    again = open_(config)
    assert again.fingerprint == first.fingerprint
    assert texts_of(again, "train") == texts_of(first, "train")
    # What does not change the tokens opens the same cache.
    for values in ({"seq_len": 64}, {"packing": "reset"}, {"seed": 3}):
        assert open_(with_(config, **values)).folder == first.folder


def test_touched_source_is_hashed_but_not_tokenised(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_(config)
    path = Path(config.sources[0].path)
    os.utime(path, (1, 1))
    monkeypatch.setattr(Tokenizer, "encode_batch", None)
    assert open_(config).fingerprint == first.fingerprint
    assert first.folder is not None
    manifest = json.loads((first.folder / "manifest.json").read_text())
    assert manifest["sources"][0]["files"][0]["mtime_ns"] == 10**9
    monkeypatch.setattr(module._FileRecord, "of", None)
    open_(config)  # the new time was noted: not even hashed


@pytest.mark.parametrize("same_size", [True, False])
def test_changed_source_is_tokenised_again(
    config: DataConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture, same_size: bool
) -> None:
    first = open_(config)
    write(tmp_path / "a.jsonl", [t.replace("story", "storm" if same_size else "tale") for t in TEXTS])
    os.utime(tmp_path / "a.jsonl", (1, 1))
    with caplog.at_level(logging.INFO, "llm_mlp.data"):
        second = open_(config)
    assert "changed since they were tokenised" in caplog.text and "a.jsonl" in caplog.text
    assert second.fingerprint != first.fingerprint
    assert "story" not in "".join(texts_of(second, "train")[0])


def test_new_file_in_a_folder_is_noticed(config: DataConfig, tmp_path: Path) -> None:
    write(tmp_path / "many" / "a.jsonl", TEXTS[:30])
    config = with_(config, sources=(SourceConfig(path=str(tmp_path / "many")),))
    open_(config)
    write(tmp_path / "many" / "b.jsonl", TEXTS[30:])
    dataset = open_(config)
    assert sorted(all_texts(dataset)) == sorted(TEXTS)


def test_source_that_changes_meanwhile(config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = module._scan

    def scan_then_write(*args: object) -> object:
        out = scan(*args)  # type: ignore[arg-type]
        write(tmp_path / "a.jsonl", TEXTS[:10])
        return out

    monkeypatch.setattr(module, "_scan", scan_then_write)
    with pytest.raises(DataError, match=r"a\.jsonl: changed while it was being read"):
        open_(config)


def test_half_written_cache_is_rebuilt(config: DataConfig, caplog: pytest.LogCaptureFixture) -> None:
    first = open_(config)
    train = texts_of(first, "train")
    assert first.folder is not None
    (first.folder / "manifest.json").unlink()
    (first.folder / "0-train.tokens").write_bytes(b"junk")
    with caplog.at_level(logging.INFO, "llm_mlp.data"):
        assert texts_of(open_(config), "train") == train
    assert "unfinished cache" in caplog.text


def test_failure_leaves_nothing_behind(config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Tokenizer, "encode_batch", fail)
    with pytest.raises(KeyboardInterrupt):
        open_(config)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("kind", ["tokens", "offsets", "ids"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damaged_shard(config: DataConfig, kind: str, damage: str) -> None:
    folder = open_(config).folder
    assert folder is not None
    path = folder / f"0-train.{kind}"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-8])
    else:
        path.unlink()
    with pytest.raises(DataError, match=rf"0-train\.{kind}: .*delete the folder {folder}"):
        open_(config)


def test_damaged_manifest_and_tokenizer(config: DataConfig) -> None:
    folder = open_(config).folder
    assert folder is not None
    Tokenizer.train(TEXTS, 300).save(folder)
    with pytest.raises(DataError, match="not the one the text was tokenised with"):
        open_(config)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"manifest\.json: not a manifest; delete the folder"):
        open_(config)


def test_other_format_version_is_rebuilt(config: DataConfig, caplog: pytest.LogCaptureFixture) -> None:
    folder = open_(config).folder
    assert folder is not None
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format_version": 0}))
    with caplog.at_level(logging.INFO, "llm_mlp.data"):
        open_(config)
    assert "written in format 0" in caplog.text


def test_trained_tokenizer_sees_training_documents_only(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    train = Tokenizer.train.__func__  # type: ignore[attr-defined]

    def spy(cls: type[Tokenizer], texts: list[str], *args: object, **kwargs: object) -> Tokenizer:
        seen.extend(texts)
        return train(cls, seen, *args, **kwargs)

    monkeypatch.setattr(Tokenizer, "train", classmethod(spy))
    for held_out in (0.2, 1e-9):
        seen.clear()
        dataset = open_(with_(config, tokenizer="bpe", vocab_size=270, held_out=held_out))
        assert dataset.tokenizer.vocab_size == 270
        assert sorted(seen) == sorted(texts_of(dataset, "train")[0])
        assert dataset.held_out[0].documents > 0


def test_tokenizer_sample_is_shared_by_weight(config: DataConfig, tmp_path: Path) -> None:
    a = write(tmp_path / "x.jsonl", [f"aaaa{i}" for i in range(500)])
    b = write(tmp_path / "y.jsonl", [f"bbbb{i}" for i in range(500)])
    sources = (SourceConfig(path=str(a), weight=3.0), SourceConfig(path=str(b)))
    texts = list(module._training_sample(sources, [0.75, 0.25], [module._Split(0)] * 2, 800 / 1e6))
    sizes = [sum(len(text) for text in texts if text.startswith(letter)) for letter in "ab"]
    assert sizes == [600, 200]


def test_resumed_tokenizer_finds_the_cache_it_came_from(config: DataConfig, no_tokenising: pytest.MonkeyPatch) -> None:
    no_tokenising.undo()
    config = with_(config, tokenizer="bpe", vocab_size=300)
    first = open_(config)
    no_tokenising.setattr(Tokenizer, "encode_batch", None)
    assert open_(config, first.tokenizer).folder == first.folder
    no_tokenising.undo()
    other = open_(config, Tokenizer.bytes())
    assert other.folder != first.folder and other.tokenizer.vocab_size == 257
    assert other.fingerprint != first.fingerprint


def test_tokenizer_files(config: DataConfig, tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(TEXTS, 320)
    tokenizer.save(tmp_path / "mine")
    dataset = open_(with_(config, tokenizer=str(tmp_path / "mine")))
    assert dataset.tokenizer.fingerprint() == tokenizer.fingerprint()


def test_weights_and_fingerprint(config: DataConfig, tmp_path: Path) -> None:
    other = write(tmp_path / "b.jsonl", [text.upper() for text in TEXTS])
    sources = (SourceConfig(path=config.sources[0].path, weight=1.0), SourceConfig(path=str(other), weight=3.0))
    dataset = open_(with_(config, sources=sources))
    assert dataset.weights == [0.25, 0.75] and len(dataset.train) == 2
    assert all(text.isupper() for text in texts_of(dataset, "train")[1])
    assert len({dataset.fingerprint, open_(config).fingerprint, open_(with_(config, held_out=0.3)).fingerprint}) == 3


def test_moved_source_keeps_its_fingerprint(config: DataConfig, tmp_path: Path) -> None:
    moved = write(tmp_path / "elsewhere" / "c.jsonl", TEXTS)
    assert open_(with_(config, sources=(SourceConfig(path=str(moved)),))).fingerprint == open_(config).fingerprint


def test_default_is_the_sample(tmp_path: Path) -> None:
    dataset = open_(DataConfig(tokenizer="byte", cache_dir=str(tmp_path)))
    assert sum(data.bytes for data in dataset.train + dataset.held_out) == sum(
        len(d.text.encode()) for d in read_documents(module.sample_source())
    )
    assert dataset.held_out[0].documents >= 1
