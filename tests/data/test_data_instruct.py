"""Instruction records: from files to documents, to tokens with a mask, to rows in which no record sees another."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_cases import CASES, SMALL, random_model
from test_data_loader import data_of as text_of
from test_data_loader import dataset_of, random_documents, same
from test_data_sources import COMPRESS

from llm_mlp.config import ConfigError, DataConfig, SourceConfig, TrainConfig, _merge, apply_overrides, build
from llm_mlp.data import DataError, Dataset, Loader, TokenData, Tokenizer, held_out_batches, prepare, read_documents
from llm_mlp.data.loader import _best_fit

BYTES = Tokenizer.bytes()
EOS = BYTES.eos
T = 32


def source(path: object, **fields: Any) -> SourceConfig:
    return SourceConfig(path=str(path), format="instruct", **fields)


def read(path: object, **fields: Any) -> list[list[tuple[str, str]]]:
    return [[(m["role"], m["content"]) for m in d.messages] for d in read_documents(source(path, **fields))]


def pair(prompt: str, completion: str) -> list[tuple[str, str]]:
    return [("user", prompt), ("assistant", completion)]


def lines(*records: Any) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


# -- files ---------------------------------------------------------------------------------------------------------

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "a", "name": "ignored"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "nobody answers"},
]
JSONL = lines(
    {"prompt": "p\n", "completion": " c", "more": 1},
    {"messages": CHAT, "prompt": "not this"},
    {"messages": None, "prompt": "", "completion": "only"},
    {"prompt": "marked", "completion": "c<|endoftext|>"},
    {"prompt": "html", "completion": "<s>c</s>"},
)
FROM_JSONL = [
    pair("p\n", " c"),
    [("system", "Be brief."), ("user", "a"), ("assistant", "b")],
    pair("", "only"),
    pair("marked", "c"),
    pair("html", "<s>c</s>"),
]
# As the files of the field have them: no quoting, line ends escaped, nothing else; here and there LaTeX.
TSV = 'one\\ntwo\t"quoted"\t\\frac{1}{2}\\n\\times\u2028\x85\n"a\t""\t  b \r\n\nx\ty\tz'
FROM_TSV = [
    pair("one\ntwo", "\\frac{1}{2}\n\\times\u2028\x85"),
    pair('"a', "  b "),
    pair("x", "z"),
]


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
def test_formats(tmp_path: Path, suffix: str) -> None:
    def write(name: str, data: bytes) -> Path:
        path = tmp_path / (name + suffix)
        path.write_bytes(COMPRESS[suffix](data) if suffix else data)
        return path

    assert read(write("a.jsonl", JSONL)) == FROM_JSONL
    named = write("a.tsv", b"\xef\xbb\xbfprompt\tanswer\tcompletion\r\n" + TSV.encode())
    assert read(named) == FROM_TSV
    bare = write("b.tsv", TSV.encode())
    columns = {"columns": ("question", "answer", "rationale"), "prompt_field": "question"}
    assert read(bare, **columns, completion_field="rationale") == FROM_TSV
    assert read(bare, **columns, completion_field="answer")[0] == pair("one\ntwo", '"quoted"')
    assert [d.id for d in read_documents(source(named))] == [f"{named}:{n}" for n in (2, 3, 5)]


def test_parquet_and_folders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "a.jsonl").write_bytes(JSONL)
    (tmp_path / "notes.txt").write_text("no record")
    table = pyarrow.table({"prompt": ["p", "q"], "completion": ["c", "d"], "messages": [None, CHAT], "other": [1, 2]})
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    assert read(tmp_path / "b.parquet") == [pair("p", "c"), FROM_JSONL[1]]
    with caplog.at_level(logging.INFO, "llm_mlp.data"):
        assert len(read(tmp_path)) == len(FROM_JSONL) + 2
    assert "1 files with unknown suffixes are left out" in caplog.text
    with pytest.raises(
        DataError, match=r"b\.parquet: no column 'm'; the columns are 'prompt', .* \(set messages_field"
    ):
        read(tmp_path / "b.parquet", messages_field="m", prompt_field="n", completion_field="o")
    with pytest.raises(DataError, match=r"notes\.txt: not a file of records; known are \.jsonl"):
        read(tmp_path / "notes.txt")
    # A source of texts sees none of this.
    assert [d.text for d in read_documents(SourceConfig(path=str(tmp_path / "notes.txt")))] == ["no record"]


def test_records_without_text_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.jsonl"
    empty = [{"prompt": "p", "completion": x} for x in ("", " \n", "<|endoftext|>")]
    halved = {"messages": [{"role": "assistant", "content": x} for x in ("a", "")]}
    path.write_bytes(lines({"prompt": "p", "completion": "c"}, {"prompt": " ", "completion": "\n"}, *empty, halved))
    with caplog.at_level(logging.INFO, "llm_mlp.data"):
        assert read(path) == [pair("p", "c")]
    assert "left out 1 documents of only white space" in caplog.text
    assert f"left out 4 records with an empty answer ({path}:3 ...)" in caplog.text
    path.write_bytes(lines(*empty))
    with pytest.raises(DataError, match="no document with text in it .0 of only white space, 3 with an empty answer"):
        read(path)


def chat(*rows: Any) -> bytes:
    return lines({"messages": list(rows)})


@pytest.mark.parametrize(
    ("name", "data", "fields", "says"),
    [
        ("jsonl", lines({"prompt": "p"}), {}, r":1: no field 'completion'; the fields are 'prompt' \(set completion_f"),
        ("jsonl", lines({"a": 1}), {}, r":1: no field 'prompt'; the fields are 'a' \(set prompt_field, messages_field"),
        ("jsonl", lines({"prompt": 1, "completion": "c"}), {}, ":1: field 'prompt' holds int, not text"),
        ("jsonl", b'{"prompt": "p", "completion": "\\ud83d"}', {}, ":1: field 'completion' is not valid Unicode"),
        ("jsonl", lines({"messages": "hi"}), {}, r":1: field 'messages' holds str, not a list of \{role, content\}"),
        ("jsonl", chat({"from": "x", "value": "y" * 99}), {}, r":1: messages\[0\] is no .*: \{'from': 'x'.*\.\.\."),
        ("jsonl", chat(CHAT[0], {"role": "bot", "content": "x"}), {}, r":1: messages\[1\]: unknown role 'bot'; rol"),
        ("jsonl", chat({"role": "user", "content": None}), {}, r":1: field 'messages\[0\]\.content' holds NoneType"),
        ("jsonl", chat(CHAT[1]), {}, ":1: field 'messages' has no message of the assistant"),
        ("tsv", b"question\tcompletion\nq\tc\n", {}, r":2: no field 'prompt'; the fields are 'question', 'completi"),
        ("tsv", b"prompt\tcompletion\nq\n", {}, r":2: 1 columns, expected 2 \('prompt', 'completion'\); a tab within"),
        ("tsv", b"q\tc\tx\n", {"columns": ("prompt", "completion")}, ":1: 3 columns, expected 2"),
        ("tsv", b"yes\tyes\na\tb\n", {}, ":1: the first row names column 'yes' twice; set columns if it is a record"),
        ("tsv", b"prompt\tcompletion\n\xff\tc\n", {}, ":2: not UTF-8"),
    ],
)
def test_bad_records(tmp_path: Path, name: str, data: bytes, fields: dict[str, Any], says: str) -> None:
    path = tmp_path / f"a.{name}"
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"a\.{name}.*{says}"):
        read(path, **fields)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.packing=joined", "packing = joined would let instruction records read each other; set packing: reset"),
        ("data.sources=[{path: a, columns: [a]}]", "columns names the columns of instruction records; set format"),
        ("data.sources=[{path: a, format: instruct, columns: [a, a]}]", "columns names 'a' twice"),
    ],
)
def test_bad_configs(override: str, says: str) -> None:
    values = {"data": {"packing": "reset", "sources": [{"path": "a", "format": "instruct"}]}}
    with pytest.raises(ConfigError, match=says):
        build(TrainConfig, apply_overrides(values, [override]))


# -- tokens and masks ------------------------------------------------------------------------------------------------

PAIRS = [(f"What is {n} times {n}?", f"It is {n * n}, é😀.") for n in range(60)]


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    (tmp_path / "a.jsonl").write_bytes(lines(*({"prompt": p, "completion": c} for p, c in PAIRS)))
    return DataConfig(
        sources=(source(tmp_path / "a.jsonl"),),
        tokenizer="byte",
        held_out=0.2,
        seq_len=128,
        packing="reset",
        cache_dir=str(tmp_path / "cache"),
    )


def with_(config: DataConfig, **values: object) -> DataConfig:
    return config.model_copy(update=values)


def open_(config: DataConfig, tokenizer: Tokenizer | None = None) -> Dataset:
    return prepare(config, tokenizer=tokenizer, progress=False)


def records_of(dataset: Dataset) -> list[tuple[str, str]]:
    """(whole text, what is counted) of every record, special tokens by name."""
    out = []
    for data in (*dataset.train, *dataset.held_out):
        for i in range(data.documents):
            ids = data.document(i)
            parts = (ids, ids[data.counted(i)])
            out.append(tuple(dataset.tokenizer.decode(part.tolist(), skip_special=False) for part in parts))
    return out  # type: ignore[return-value]


def test_shards_hold_tokens_and_a_mask(config: DataConfig) -> None:
    dataset = open_(config)
    want = [(f"user:\n{p}\nassistant:\n{c}<|eos|>", f"{c}<|eos|>") for p, c in PAIRS]
    assert sorted(records_of(dataset)) == sorted(want)
    train = dataset.train[0]
    assert train.mask is not None and train.mask.dtype == np.uint8 and len(train.mask) == len(train.tokens)
    assert isinstance(train.mask, np.memmap) and set(train.mask.tolist()) == {0, 1}
    number = {f"{config.sources[0].path}:{n + 1}": p for n, (p, _) in enumerate(PAIRS)}
    assert all(number[name] in dataset.tokenizer.decode(train.document(i)) for i, name in enumerate(train.doc_ids))
    assert train.bytes + dataset.held_out[0].bytes == sum(len(f"{p}\n{c}".encode()) for p, c in PAIRS)
    assert dataset.folder is not None
    names = {path.name for path in dataset.folder.iterdir()}
    assert {"0-train.mask", "0-held_out.mask", "chat_template.jinja"} <= names
    assert dataset.tokenizer.chat_template == (dataset.folder / "chat_template.jinja").read_text()


def test_caches_are_read_again_and_damage_is_seen(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_(config)
    monkeypatch.setattr(Tokenizer, "encode_batch", None)  # nothing is tokenised again
    again = open_(config)
    assert again.folder == first.folder and again.fingerprint == first.fingerprint and again.parts["chat_template"]
    assert first.folder is not None
    mask = first.folder / "0-train.mask"
    mask.write_bytes(mask.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"0-train\.mask: .* bytes where the manifest says"):
        open_(config)
    mask.unlink()
    with pytest.raises(DataError, match=r"0-train\.mask: missing"):
        open_(config)


def test_texts_do_not_depend_on_a_template(config: DataConfig, tmp_path: Path) -> None:
    """A tokenizer that knows chats reads the cache of one that does not, and still knows them."""
    (tmp_path / "b.jsonl").write_bytes(lines(*({"text": f"document {n}"} for n in range(9))))
    texts = with_(config, sources=(SourceConfig(path=str(tmp_path / "b.jsonl")),))
    dataset = open_(texts)
    chatting = open_(texts, BYTES.with_chat_template("{{ messages }}"))
    assert chatting.folder == dataset.folder and chatting.tokenizer.chat_template == "{{ messages }}"
    assert open_(texts).tokenizer.chat_template is None and dataset.train[0].mask is None


def test_another_template_is_another_cache(config: DataConfig, tmp_path: Path) -> None:
    ours = open_(config)
    file = tmp_path / "mine.jinja"
    file.write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
        "{{ eos_token if m.role == 'assistant' }}{% endfor %}{{ '<assistant>' if add_generation_prompt }}"
    )
    named = open_(with_(config, chat_template=str(file)))
    assert named.folder != ours.folder and named.fingerprint != ours.fingerprint
    assert f"<user>{PAIRS[3][0]}<assistant>{PAIRS[3][1]}<|eos|>" in [text for text, _ in records_of(named)]
    # A checkpoint's or a tokenizer folder's own goes before ours, and the named one before all.
    carried = open_(config, BYTES.with_chat_template(file.read_text()))
    assert carried.folder == named.folder and carried.tokenizer.chat_template == file.read_text()
    named.tokenizer.save(tmp_path / "tokenizer")
    assert open_(with_(config, tokenizer=str(tmp_path / "tokenizer"))).folder == named.folder
    other = open_(with_(config, chat_template=str(file)), BYTES.with_chat_template("{{ messages }}"))
    assert other.folder == named.folder
    endless = "{% for m in messages %}{{ m.content }}|{% endfor %}"
    with pytest.raises(DataError, match="does not end an answer with a special token.*; name another with data.chat_"):
        open_(config, BYTES.with_chat_template(endless))
    with pytest.raises(ValueError, match=r"nowhere\.jinja: the chat template cannot be read"):
        open_(with_(config, chat_template=str(tmp_path / "nowhere.jinja")))


def test_a_record_the_template_refuses_is_named(config: DataConfig, tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    both = "{{ raise_exception('no sevens') if '7 times' in messages[0].content }}"
    file.write_text(both + BYTES_TEMPLATE)
    with pytest.raises(DataError, match=r"a\.jsonl:8: the chat template refuses these messages: no sevens"):
        open_(with_(config, chat_template=str(file)))
    file.write_text(BYTES_TEMPLATE.replace("m.content", "m.content.replace('49', 'XLIX')"))
    with pytest.raises(DataError, match=r"a\.jsonl:8: the chat template changes an answer of this record"):
        open_(with_(config, chat_template=str(file)))


BYTES_TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{{ eos_token if m.role == 'assistant' else '|' }}{% endfor %}"
    "{{ '' if add_generation_prompt }}"
)


def test_prepared_elsewhere(config: DataConfig, tmp_path: Path) -> None:
    first = open_(config)
    os.unlink(config.sources[0].path)
    moved = DataConfig(prepared=str(first.folder), held_out=0.2, packing="reset", seq_len=128)
    again = open_(moved)
    assert again.fingerprint == first.fingerprint and records_of(again) == records_of(first)
    assert again.tokenizer.chat_template == first.tokenizer.chat_template
    assert open_(moved, Tokenizer.bytes()).tokenizer.chat_template == first.tokenizer.chat_template
    with pytest.raises(DataError, match="another chat template than the checkpoint's"):
        open_(moved, BYTES.with_chat_template(BYTES_TEMPLATE))
    (tmp_path / "t.jinja").write_text(BYTES_TEMPLATE)
    with pytest.raises(DataError, match="another chat template than data.chat_template"):
        open_(with_(moved, chat_template=str(tmp_path / "t.jinja")))
    with pytest.raises(DataError, match="holds sources of format instruct; the config names others"):
        open_(with_(moved, sources=(SourceConfig(path="a"),)))
    with pytest.raises(ConfigError, match=r"data\.packing = joined would let instruction records read each other"):
        Loader(again, with_(moved, packing="joined"), batch_size=1, steps_hint=1)


def test_a_vocabulary_is_trained_on_contents(config: DataConfig) -> None:
    dataset = open_(with_(config, tokenizer="bpe", vocab_size=270))
    assert dataset.tokenizer.vocab_size == 270
    assert len(dataset.tokenizer.encode("What is")) < len(b"What is")
    resumed = open_(with_(config, tokenizer="bpe", vocab_size=270), dataset.tokenizer)
    assert resumed.folder == dataset.folder


# -- rows ------------------------------------------------------------------------------------------------------------


def data_of(records: list[tuple[list[int], list[int]]]) -> TokenData:
    """Records of (prompt, answer)."""
    ids = [[*prompt, *answer] for prompt, answer in records]
    mask = [[0] * len(prompt) + [1] * len(answer) for prompt, answer in records]
    offsets = np.cumsum([0, *map(len, ids)]).astype(np.int64)
    flat = (np.array([i for row in rows for i in row]) for rows in (ids, mask))
    tokens, counted = next(flat).astype(np.uint16), next(flat).astype(np.uint8)
    return TokenData(tokens, offsets, int(offsets[-1]), None, counted)


def random_records(count: int, seed: int, longest: int = T) -> list[tuple[list[int], list[int]]]:
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        n = int(rng.integers(2, longest + 1))
        at = int(rng.integers(0, n - 1))
        ids = rng.integers(0, 256, n).tolist()
        out.append((ids[:at], [*ids[at : n - 1], EOS]))
    return out


RECORDS = random_records(80, 1)
ONE = dataset_of([data_of(RECORDS)])


def loader_of(dataset: Dataset, batch_size: int = 4, **values: Any) -> Loader:
    config = DataConfig.model_validate({"seq_len": T, "packing": "reset", **values})
    return Loader(dataset, config, batch_size=batch_size, steps_hint=10)


def epoch_of(loader: Loader, epoch: int) -> Any:
    per_epoch = loader._shuffled[0].per_epoch
    return loader.samples(epoch * per_epoch, per_epoch)


def sequences(batch: Any) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(tokens, targets) of every sequence that has a target."""
    cu = batch.cu_seqlens.tolist()
    parts = [(batch.tokens[0, a:b], batch.targets[0, a:b]) for a, b in zip(cu, cu[1:], strict=False)]
    return [(tuple(x.tolist()), tuple(y.tolist())) for x, y in parts if (y >= 0).any()]


def expected(prompt: list[int], answer: list[int], length: int = T) -> tuple[tuple[int, ...], tuple[int, ...]]:
    ids = [*prompt, *answer][:length]
    return (EOS, *ids[:-1]), tuple([-100] * len(prompt) + answer)[:length]


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_every_record_once_an_epoch_whole_and_alone(epoch: int) -> None:
    batch = epoch_of(loader_of(ONE), epoch)
    assert Counter(sequences(batch)) == Counter(expected(*record) for record in RECORDS)
    cu = batch.cu_seqlens
    assert cu.dtype == torch.int32 and cu[0] == 0 and cu[-1] == batch.tokens.numel() and (cu.diff() > 0).all()
    assert {n * T for n in range(batch.tokens.numel() // T)} <= set(cu.tolist())  # no record crosses rows
    held = sum(len(p) + len(a) for p, a in RECORDS)
    assert held / batch.tokens.numel() > 0.9
    # What is empty is a sequence of its own in which nothing counts.
    left = batch.tokens.numel() - held
    padding = [n for n in range(len(cu) - 1) if (batch.targets[0, cu[n] : cu[n + 1]] < 0).all()]
    assert sum(int(cu[n + 1] - cu[n]) for n in padding) == left
    assert all((batch.tokens[0, cu[n] : cu[n + 1]] == EOS).all() for n in padding)


def test_epochs_differ() -> None:
    loader = loader_of(ONE)
    epochs = [epoch_of(loader, e) for e in range(3)]
    assert len({tuple(e.tokens[0].tolist()) for e in epochs}) == 3
    rows = [{tuple(row.tolist()) for row in e.tokens.view(-1, T)} for e in epochs]
    assert len(rows[0] & rows[1]) < len(rows[0])  # not only the rows' order


@pytest.mark.parametrize("mixed", [False, True])
def test_batches_depend_on_their_index_alone(mixed: bool) -> None:
    dataset = dataset_of([data_of(RECORDS), text_of(random_documents(40, 2))]) if mixed else ONE
    one, other = loader_of(dataset), loader_of(dataset)
    forward = [next(one) for _ in range(60)]
    for i in (59, 3, 40, 0):
        assert same(other.batch(i), forward[i])
    parts = [other.samples(4 * 7 + i, 1) for i in range(4)]
    assert torch.equal(torch.cat([p.tokens for p in parts], 1), forward[7].tokens)
    assert torch.equal(torch.cat([p.targets for p in parts], 1), forward[7].targets)
    resumed = loader_of(dataset)
    resumed.load_state_dict({**one.state_dict(), "sample": 4 * 13})
    assert all(same(next(resumed), batch) for batch in forward[13:])
    assert not same(loader_of(dataset, seed=1).batch(0), forward[0])


def test_texts_and_records_in_one_run() -> None:
    texts = random_documents(40, 2)
    dataset = dataset_of([text_of(texts), data_of(RECORDS)], weights=[0.5, 0.5])
    loader, alone = loader_of(dataset), loader_of(dataset_of([text_of(texts)]), batch_size=1)
    seen = 0
    for n in range(100):
        batch = loader.samples(n, 1)
        number, local = loader._mixture(n)
        if number == 0:
            assert torch.equal(batch.tokens, alone.samples(local, 1).tokens)
            assert torch.equal(batch.targets, alone.samples(local, 1).targets)
        else:
            known = {expected(*record) for record in RECORDS}
            assert all(row in known for row in sequences(batch))
            seen += 1
    assert 45 <= seen <= 55


def test_long_records_lose_their_end_or_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    fits, cut, late = ([1] * 3, [2, EOS]), ([3] * (T - 2), [4] * 20), ([5] * T, [6, EOS])
    exact = ([7] * (T - 1), [EOS])
    dataset = dataset_of([data_of([fits, cut, late, exact])])
    with caplog.at_level(logging.INFO, "llm_mlp.data"):
        loader = loader_of(dataset)
    assert f"1 records are longer than seq_len = {T} and lose the end of their answers (1)" in caplog.text
    assert f"1 records are left out, as their answers begin behind seq_len = {T} (2)" in caplog.text
    assert f"3 records in 3 rows, {100 * (5 + T + T) / (3 * T):.1f} % filled" in caplog.text
    found = sequences(epoch_of(loader, 0))
    assert sorted(found) == sorted(expected(*record) for record in (fits, cut, exact))
    with pytest.raises(DataError, match=f"source0: all answers begin behind seq_len = {T}; raise data.seq_len"):
        loader_of(dataset_of([data_of([late])], [data_of([fits])]))
    with pytest.raises(DataError, match=f"no held-out record's answer begins within seq_len = {T}"):
        loader_of(dataset_of([data_of([fits])], [data_of([late])]))


def test_best_fit() -> None:
    capacity = 200
    lengths = np.sort(np.random.default_rng(0).integers(1, capacity + 1, 2000))[::-1]
    rows, count = _best_fit(lengths, capacity)
    used = np.bincount(rows, lengths, count)
    assert used.max() <= capacity and len(used) == count
    assert count <= 1.02 * lengths.sum() / capacity + 1
    # The naive rule, step by step.
    room: list[int] = []
    for n, length in enumerate(lengths[:300].tolist()):
        fitting = [r for r in range(len(room)) if room[r] >= length]
        if not fitting:
            room.append(capacity)
        assert room[rows[n]] == (min(room[r] for r in fitting) if fitting else capacity)
        room[rows[n]] -= length


def test_held_out_records() -> None:
    texts = [BYTES.encode(text) for text in ("one é", "two 😀!" * 9)]
    dataset = dataset_of([text_of(texts), data_of(RECORDS)], [text_of(texts), data_of(RECORDS)])
    found = list(held_out_batches(dataset, seq_len=T, batch_size=3, max_tokens=10**6))
    packed = [(batch, size) for batch, size in found if batch.cu_seqlens is not None]
    assert len(packed) < len(found)
    assert Counter(row for batch, _ in packed for row in sequences(batch)) == Counter(expected(*r) for r in RECORDS)
    # Bytes of what is counted alone; an eos has none.
    assert sum(size for _, size in packed) == sum(len(answer) - 1 for _, answer in RECORDS)
    text = [batch for batch, _ in found if batch.cu_seqlens is None]
    assert [i for b in text for i in b.targets.flatten().tolist() if i >= 0] == [i for t in texts for i in (*t, EOS)]
    some = list(held_out_batches(dataset_of([data_of(RECORDS)]), seq_len=T, batch_size=3, max_tokens=5 * T))
    assert sum(batch.tokens.numel() for batch, _ in some) == 5 * T


# -- no leaks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["plain", "wide", "attention", "everything"])
def test_no_record_sees_another(case: str) -> None:
    model = random_model(_merge(_merge(SMALL, CASES[case]), {"vocab_size": 257}))
    batch = loader_of(ONE, batch_size=4).batch(1)
    cu = batch.cu_seqlens
    assert cu is not None and len(cu) > 7
    with torch.no_grad():
        before = model(batch.tokens, cu_seqlens=cu).logits[0]
        for n in range(len(cu) - 1):
            a, b = int(cu[n]), int(cu[n + 1])
            changed = batch.tokens.clone()
            changed[0, a:b] = (changed[0, a:b] + 1) % 257
            after = model(changed, cu_seqlens=cu).logits[0]
            outside = torch.ones(len(before), dtype=torch.bool)
            outside[a:b] = False
            assert torch.equal(after[outside], before[outside]), f"sequence {n}"
            assert not torch.equal(after[a:b], before[a:b])
        # And each is what it is alone.
        a, b = int(cu[1]), int(cu[2])
        alone = model(batch.tokens[:, a:b]).logits[0]
        torch.testing.assert_close(before[a:b], alone, rtol=0, atol=1e-9)
