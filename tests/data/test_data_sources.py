"""Every kind of source, and every way one can be broken."""

from __future__ import annotations

import gzip
import json
import logging
import lzma
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]
import pytest
import zstandard

from llm_mlp.config import SourceConfig
from llm_mlp.data import DataError, read_documents, sample_source, source_files

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def read(path: Path | str, field: str = "text") -> list[tuple[str, str]]:
    return [(d.text, d.id) for d in read_documents(SourceConfig(path=str(path), text_field=field))]


def lines(*records: object) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


@pytest.mark.parametrize("suffix", COMPRESS)
def test_json_lines(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    data = b"\xef\xbb\xbf" + lines({"text": "one", "title": "T"}) + b"\n  \n" + lines({"text": "zwei é 😀"})
    path.write_bytes(COMPRESS[suffix](data))
    assert read(path) == [("one", f"{path}:1"), ("zwei é 😀", f"{path}:4")]


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.log", "a"])
def test_text_is_one_document_as_it_is(tmp_path: Path, name: str, suffix: str) -> None:
    path = tmp_path / (name + suffix)
    path.write_bytes(COMPRESS[suffix]("\ufeffone\r\n\ntwo é\n".encode()))
    assert read(path) == [("one\r\n\ntwo é\n", str(path))]


def test_concatenated_zstandard_frames(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(COMPRESS[".zst"](lines({"text": "a"})) + COMPRESS[".zst"](lines({"text": "b" * 400_000})))
    assert [len(text) for text, _ in read(path)] == [1, 400_000]


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["one", " ", "two"], "n": [1, 2, 3]}), path)
    assert read(path, "body") == [("one", f"{path}#0"), ("two", f"{path}#2")]
    with pytest.raises(DataError, match=r"a\.parquet: no column 'text'; the columns are 'body', 'n'"):
        read(path)
    with pytest.raises(DataError, match=r"a\.parquet#0: field 'n' holds int, not text"):
        read(path, "n")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"a\.parquet: not a sound Parquet file"):
        read(path, "body")


def test_folder_is_read_in_order_without_hidden_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("b.txt", "a/z.md", "a/.hidden.txt", ".git/c.txt", "a/picture.png", "c.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "a" / "__init__.py").write_text("")
    (tmp_path / "d.jsonl").write_bytes(lines({"text": "json"}))
    with caplog.at_level(logging.INFO, "llm_mlp.data"):
        assert [text for text, _ in read(tmp_path)] == ["a/z.md", "b.txt", "c.py", "json"]
    assert "1 files with unknown suffixes are left out" in caplog.text
    assert "left out 1 documents of only white space" in caplog.text


def test_glob(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.md", "d/e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [text for text, _ in read(tmp_path / "*.txt")] == ["a.txt", "b.txt"]
    assert [text for text, _ in read(tmp_path / "**" / "*.txt")] == ["a.txt", "b.txt", "d/e.txt"]
    with pytest.raises(DataError, match=r"\*\.rst: no file matches"):
        read(tmp_path / "*.rst")
    (tmp_path / "x[1].txt").write_text("a name, no pattern")
    assert read(tmp_path / "x[1].txt")[0][0] == "a name, no pattern"


def test_white_space_is_counted_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines({"text": "x"}, {"text": " \n"}, {"text": ""}))
    with caplog.at_level(logging.INFO, "llm_mlp.data"):
        assert len(read(path)) == 1
    assert caplog.text.count("left out 2 documents") == 1
    path.write_bytes(lines({"text": " \n"}))
    with pytest.raises(DataError, match="no document with text in it"):
        read(path)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (lines({"text": "a"}) + b'{"text": "b', r"a\.jsonl:2: not JSON"),
        (lines({"text": "a"}, {"body": "b", "n": 1}), r"a\.jsonl:2: no field 'text'; the fields are 'body', 'n'"),
        (lines({}), r"a\.jsonl:1: no field 'text'; the fields are none"),
        (lines({"text": None}), r"a\.jsonl:1: field 'text' holds NoneType, not text"),
        (lines({"text": ["a"]}), r"a\.jsonl:1: field 'text' holds list, not text"),
        (lines(["a"]), r"a\.jsonl:1: expected a record"),
        (b'{"text": "\\ud83d"}\n', r"a\.jsonl:1: field 'text' is not valid Unicode"),
        (b'{"text": "\xff"}\n', r"a\.jsonl:1: not UTF-8"),
        (b"", r"a\.jsonl: the file is empty"),
        (b"PAR1\x00\x00", r"a\.jsonl:1: binary data"),
    ],
)
def test_bad_json_lines(tmp_path: Path, data: bytes, says: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(data)
    with pytest.raises(DataError, match=says):
        read(path)


@pytest.mark.parametrize(
    ("data", "says"),
    [(b"", "empty"), (b"ab\0c", "binary data"), ("é".encode("latin1"), "not UTF-8"), (b" \n", "no document with text")],
)
def test_bad_text(tmp_path: Path, data: bytes, says: str) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(DataError, match=rf"a\.txt: .*{says}"):
        read(tmp_path / "a.txt")


@pytest.mark.parametrize("kind", ["jsonl", "txt"])
@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_half_written_compressed_file(tmp_path: Path, suffix: str, kind: str) -> None:
    path = tmp_path / f"a.{kind}{suffix}"
    whole = COMPRESS[suffix](lines(*({"text": f"document {i * i}"} for i in range(2000))))
    path.write_bytes(whole)
    assert read(path)
    for size in (len(whole) - 1, len(whole) // 2, 3):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=rf"{path.name}: .*(cut off|not a sound)"):
            read(path)
    path.write_bytes(b"plain text, not compressed at all")
    with pytest.raises(DataError, match=rf"{path.name}: not a sound {suffix} file"):
        read(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match=rf"{path.name}: the file is empty"):
        read(path)
    path.write_bytes(COMPRESS[suffix](b""))
    with pytest.raises(DataError, match=r"empty|no document"):
        read(path)


def test_missing_and_useless(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.txt: no such file or folder"):
        source_files(SourceConfig(path=str(tmp_path / "nowhere.txt")))
    (tmp_path / "picture.png").write_bytes(b"x")
    with pytest.raises(DataError, match="no file in this folder can be used"):
        source_files(SourceConfig(path=str(tmp_path)))


def test_empty_json_lines_in_a_folder_is_damage(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.jsonl").write_text("")
    with pytest.raises(DataError, match=r"b\.jsonl: the file is empty"):
        read(tmp_path)


def test_hugging_face(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"hf:a/b: needs the datasets library: pip install 'llm-mlp\[hf\]'"):
        read("hf:a/b")
    asked = []

    def load_dataset(name: str, **kwargs: object) -> list[dict[str, str]]:
        asked.append((name, kwargs))
        return [{"text": "one"}, {"text": ""}, {"text": "two"}]

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert read("hf:a/b:test") == [("one", "hf:a/b:test#0"), ("two", "hf:a/b:test#2")]
    assert asked == [("a/b", {"split": "test", "streaming": True})]
    assert source_files(SourceConfig(path="hf:a/b")) == []
    with pytest.raises(DataError, match="no field 'body'; the fields are 'text'"):
        read("hf:a/b", "body")


def test_sample() -> None:
    source = sample_source()
    texts = [document.text for document in read_documents(source)]
    assert len(texts) >= 60 and 1.8e6 < sum(len(text) for text in texts) < 2.2e6
    assert len(set(texts)) == len(texts) and max(map(len, texts)) < 130_000 and min(map(len, texts)) > 2000
    assert Path(source.path).stat().st_size < 800_000
    assert not any("## Contents" in text for text in texts)
    assert "public domain" in (Path(source.path).parent / "README.md").read_text()
