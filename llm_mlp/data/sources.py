"""Where documents come from: text, JSON lines, TSV, Parquet (all also compressed), folders, globs, Hugging Face sets.

A document is a text, or, of a source of instruction records, a conversation.
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import logging
import lzma
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import zstandard

from llm_mlp.config import SourceConfig
from llm_mlp.data.tokenizer import EOS_NAMES

logger = logging.getLogger("llm_mlp.data")

COMPRESSED = (".gz", ".xz", ".zst")
JSON_LINES = (".jsonl", ".ndjson", ".json")
# What is picked up in a folder as one document a file. A file or glob named outright may have any suffix.
TEXT = (
    *(".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".html"),
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java", ".js", ".ts", ".sh", ".sql"),
)
RECORDS = (*JSON_LINES, ".tsv", ".parquet")
HUGGING_FACE = "hf:"
ROLES = ("system", "user", "assistant")
# What some files end their answers with; training ends them itself. Not </s>, which HTML ends struck-out text with.
END_MARKS = tuple(name for name in EOS_NAMES if name != "</s>")

Record = tuple[dict[str, Any], str]  # fields, and where it stands


class DataError(ValueError):
    """Data that cannot be used; the message names the file (and line) and says what to do."""


@dataclass(frozen=True)
class Document:
    text: str
    """Of a conversation: its roles and contents as JSON, which tells conversations apart."""
    id: str
    """``path`` of a text file, ``path:line`` of JSON lines and TSV (from 1), ``path#row`` of Parquet (from 0)."""
    messages: tuple[dict[str, str], ...] = ()
    """Of a conversation: ``role`` and ``content``, up to the last answer; empty: the document is a text."""

    @property
    def contents(self) -> str:
        """The text alone: what a vocabulary is trained on."""
        return "\n".join(message["content"] for message in self.messages) if self.messages else self.text


def sample_source() -> SourceConfig:
    """The public-domain stories that ship with the package."""
    return SourceConfig(path=str(Path(__file__).parent / "sample" / "stories.jsonl.xz"))


def is_hugging_face(source: SourceConfig) -> bool:
    return source.path.startswith(HUGGING_FACE)


# -- files -----------------------------------------------------------------------------------------------------------


def _kind(path: Path) -> str:
    """The suffix that tells the format: ``.jsonl`` of ``a.jsonl.gz``."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _files_in(folder: Path, kinds: tuple[str, ...]) -> list[Path]:
    files, other = [], 0
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(root, name)
            if name.startswith("."):
                continue
            if not path.is_file():  # a broken link, a pipe
                logger.info("%s: not a regular file; left out", path)
                continue
            if _kind(path) in kinds:
                files.append(path)
            else:
                other += 1
    if not files:
        raise DataError(
            f"{folder}: no file in this folder can be used ({other} with other suffixes); "
            f"known are {', '.join(kinds[:8])}{' ...' if len(kinds) > 8 else ''}, also with {', '.join(COMPRESSED)}"
        )
    if other:
        logger.info("%s: %d files with unknown suffixes are left out", folder, other)
    return files


def source_files(source: SourceConfig) -> list[Path]:
    """The files of a source, sorted; none for Hugging Face data sets."""
    if is_hugging_face(source):
        return []
    path = Path(source.path).expanduser()
    if path.is_dir():
        kinds = RECORDS if source.format == "instruct" else (*TEXT[:4], *JSON_LINES, ".parquet", *TEXT[4:])
        return sorted(_files_in(path, kinds))
    if path.is_file():
        return [path]
    if glob.has_magic(source.path):
        files = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if os.path.isfile(name))
        if not files:
            raise DataError(f"{source.path}: no file matches this pattern")
        return files
    raise DataError(f"{source.path}: no such file or folder")


# -- bytes -----------------------------------------------------------------------------------------------------------


class _Zstandard(io.RawIOBase):
    """Reads frames of zstandard; unlike the library's own reader it notices a file that ends within a frame."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw, self._frame, self._input, self._ready = raw, None, b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if not self._input:
                self._input = self._raw.read(1 << 18)
                if not self._input:
                    if self._frame is not None:
                        raise EOFError("the last frame is not complete")
                    return 0
            frame: Any = self._frame or zstandard.ZstdDecompressor().decompressobj()
            self._ready = frame.decompress(self._input)
            self._input, self._frame = (frame.unused_data, None) if frame.eof else (b"", frame)
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The decompressed bytes of ``path``; a damaged file is a `DataError`."""
    suffix = path.suffix.lower()
    try:
        with open(path, "rb") as raw:
            if suffix == ".gz":
                yield cast(IO[bytes], gzip.GzipFile(fileobj=raw))
            elif suffix == ".xz":
                yield lzma.LZMAFile(raw)  # noqa: SIM115 (raw is closed)
            elif suffix == ".zst":
                yield io.BufferedReader(_Zstandard(raw), 1 << 18)
            else:
                yield raw
    except EOFError as error:
        raise DataError(f"{path}: the compressed file is cut off ({error}); copy it again") from None
    except (gzip.BadGzipFile, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
        raise DataError(f"{path}: not a sound {suffix} file ({error}); copy it again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def _decode(data: bytes, where: str) -> str:
    if b"\0" in data:
        raise DataError(f"{where}: binary data (a NUL byte at {data.index(0)}); expected UTF-8 text")
    try:
        return data.decode("utf8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not UTF-8 (byte {error.start}: {error.reason}); convert it, e.g. with iconv"
        ) from None


def _checked(value: object, field: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: field {field!r} holds {type(value).__name__}, not text")
    try:
        value.encode("utf8")
    except UnicodeEncodeError:
        raise DataError(f"{where}: field {field!r} is not valid Unicode (half a surrogate pair)") from None
    return value


# -- formats ---------------------------------------------------------------------------------------------------------


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Lines that are not blank, and where each stands."""
    with _opened(path) as file:
        number = 0
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                where = f"{path}:{number}"
                yield _decode(line, where), where
        if number == 0:
            raise DataError(f"{path}: the file is empty")


def _json_lines(path: Path) -> Iterator[Record]:
    for text, where in _lines(path):
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not JSON ({error}); expected one record a line") from None
        if not isinstance(record, dict):
            raise DataError(f"{where}: expected a record {{...}}, got {type(record).__name__}; one record a line")
        yield record, where


def _tsv(path: Path, columns: tuple[str, ...]) -> Iterator[Record]:
    """Rows by the names of their columns: ``columns``, else the first row.

    A row is a line and a tab always ends a field. Quotation marks are what they are. ``\\n`` is a line end; other
    backslashes stay, because those who write such files escape line ends alone (``\\frac`` is no form feed).
    """
    names = columns
    for text, where in _lines(path):
        cells = text.rstrip("\r\n").split("\t")
        if not names:
            names = tuple(cells)
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise DataError(
                    f"{where}: the first row names column {twice[0]!r} twice; set columns if it is a record already"
                )
            continue
        if len(cells) != len(names):
            raise DataError(
                f"{where}: {len(cells)} columns, expected {len(names)} ({', '.join(map(repr, names))}); a tab "
                "within a text has to be replaced, a line end written as \\n"
            )
        yield dict(zip(names, (cell.replace("\\n", "\n") for cell in cells), strict=True)), where


def _parquet(path: Path, wanted: tuple[str, ...]) -> Iterator[Record]:
    """Rows with those of the columns ``wanted`` that there are."""
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        file = pyarrow.parquet.ParquetFile(path)
        found = [name for name in wanted if name in file.schema_arrow.names]
        if not found:
            names = ", ".join(map(repr, file.schema_arrow.names))
            raise DataError(f"{path}: no column {wanted[0]!r}; the columns are {names} (set {_setting(wanted)})")
        row = 0
        for batch in file.iter_batches(batch_size=1024, columns=found):
            for record in batch.to_pylist():
                yield record, f"{path}#{row}"
                row += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a sound Parquet file: {error}") from None


def _text(path: Path) -> Iterator[Document]:
    with _opened(path) as file:
        yield Document(_decode(file.read(), str(path)).removeprefix("\ufeff"), str(path))


def _hugging_face(source: SourceConfig) -> Iterator[Record]:
    name, _, split = source.path.removeprefix(HUGGING_FACE).partition(":")
    try:
        from datasets import load_dataset  # type: ignore[import-not-found]
    except ImportError:
        raise DataError(f"{source.path}: needs the datasets library: pip install 'llm-mlp[hf]'") from None
    try:
        records = load_dataset(name, split=split or "train", streaming=True)
    except Exception as error:  # whatever the hub, the network or the data set's own code raises
        raise DataError(f"{source.path}: cannot be loaded: {error}") from error
    for row, record in enumerate(records):
        yield record, f"{source.path}#{row}"


def _setting(wanted: tuple[str, ...]) -> str:
    return "text_field" if len(wanted) == 1 else "messages_field, or prompt_field and completion_field"


def _records(path: Path, source: SourceConfig, wanted: tuple[str, ...]) -> Iterator[Record] | None:
    """Of a file of records; None if it is one text."""
    kind = _kind(path)
    if kind == ".parquet":
        return _parquet(path, wanted)
    if kind == ".tsv" and source.format == "instruct":
        return _tsv(path, source.columns)
    if kind in JSON_LINES:
        return _json_lines(path)
    if source.format == "instruct":
        raise DataError(f"{path}: not a file of records; known are {', '.join(RECORDS)}, also compressed")
    return None


# -- records to documents --------------------------------------------------------------------------------------------


def _field(record: dict[str, Any], field: str, where: str, setting: str) -> str:
    if field not in record:
        fields = ", ".join(map(repr, record)) or "none"
        raise DataError(f"{where}: no field {field!r}; the fields are {fields} (set {setting})")
    return _checked(record[field], field, where)


def _conversation(record: dict[str, Any], where: str, source: SourceConfig) -> tuple[dict[str, str], ...]:
    """A record's messages up to its last answer; nothing behind it is trained on."""
    if record.get(source.messages_field) is None:
        hint = "prompt_field, messages_field for chats, or columns where a TSV's first row is a record already"
        prompt = _field(record, source.prompt_field, where, hint)
        completion = _field(record, source.completion_field, where, "completion_field")
        return {"role": "user", "content": prompt}, {"role": "assistant", "content": _unmarked(completion)}
    name, rows = source.messages_field, record[source.messages_field]
    if not isinstance(rows, list):
        raise DataError(f"{where}: field {name!r} holds {type(rows).__name__}, not a list of {{role, content}}")
    messages = []
    for n, row in enumerate(rows):
        if not isinstance(row, dict) or "role" not in row or "content" not in row:
            raise DataError(f"{where}: {name}[{n}] is no {{role, content}}: {_short(row)}")
        if row["role"] not in ROLES:
            raise DataError(f"{where}: {name}[{n}]: unknown role {row['role']!r}; roles are {', '.join(ROLES)}")
        content = _checked(row["content"], f"{name}[{n}].content", where)
        if row["role"] == "assistant":
            content = _unmarked(content)
        messages.append({"role": row["role"], "content": content})
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        raise DataError(f"{where}: field {name!r} has no message of the assistant, so there is nothing to learn from")
    return tuple(messages)


def _unmarked(answer: str) -> str:
    for mark in END_MARKS:
        answer = answer.removesuffix(mark)
    return answer


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _read_file(path: Path, source: SourceConfig, wanted: tuple[str, ...], named: bool) -> Iterator[Document | Record]:
    kind = _kind(path)
    # In a folder of many texts an empty one (an empty __init__.py) is a document of nothing, not a damaged file.
    may_be_empty = not named and kind not in RECORDS and path.suffix.lower() not in COMPRESSED
    if path.stat().st_size == 0 and not may_be_empty:
        raise DataError(f"{path}: the file is empty")
    records = _records(path, source, wanted)
    return _text(path) if records is None else records


@dataclass
class _LeftOut:
    """What a source has that cannot be used, to be told once."""

    blank: int = 0
    unanswered: int = 0
    first: str = ""  # of the unanswered

    def log(self, path: str) -> None:
        if self.blank:
            logger.info("%s: left out %d documents of only white space", path, self.blank)
        if self.unanswered:
            logger.info("%s: left out %d records with an empty answer (%s ...)", path, self.unanswered, self.first)


def read_documents(source: SourceConfig, *, quiet: bool = False) -> Iterator[Document]:
    """The documents of ``source`` in the order of its sorted files; those of only white space are left out, and so are
    conversations with an answer of only white space.

    How many were left out is logged, unless ``quiet``. Texts come as they are: line ends are not changed.

    Raises:
        DataError: naming the file, the line and the field.
    """
    files = source_files(source)
    named = len(files) == 1 and files[0] == Path(source.path).expanduser()
    instruct = source.format == "instruct"
    fields = (source.messages_field, source.prompt_field, source.completion_field) if instruct else (source.text_field,)
    used, left = 0, _LeftOut()

    def found() -> Iterator[Document | Record]:
        if is_hugging_face(source):
            yield from _hugging_face(source)
        for path in files:
            yield from _read_file(path, source, fields, named)

    for item in found():
        document = item if isinstance(item, Document) else _document(*item, source)
        if not document.contents.strip():
            left.blank += 1
        elif any(m["role"] == "assistant" and not m["content"].strip() for m in document.messages):
            left.unanswered += 1
            left.first = left.first or document.id
        else:
            used += 1
            yield document
    if not used:
        raise DataError(
            f"{source.path}: no document with text in it ({left.blank} of only white space"
            f"{f', {left.unanswered} with an empty answer' if left.unanswered else ''})"
        )
    if not quiet:
        left.log(source.path)


def _document(record: dict[str, Any], where: str, source: SourceConfig) -> Document:
    if source.format == "text":
        return Document(_field(record, source.text_field, where, "text_field"), where)
    messages = _conversation(record, where, source)
    identity = json.dumps([[message["role"], message["content"]] for message in messages], ensure_ascii=False)
    return Document(identity, where, messages)
