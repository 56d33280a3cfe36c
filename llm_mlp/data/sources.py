"""Where documents come from: text, JSON lines, Parquet, plain or compressed, folders, globs, Hugging Face data sets."""

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

logger = logging.getLogger("llm_mlp.data")

COMPRESSED = (".gz", ".xz", ".zst")
JSON_LINES = (".jsonl", ".ndjson", ".json")
# What is picked up in a folder as one document a file. A file or glob named outright may have any suffix.
TEXT = (
    *(".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".html"),
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java", ".js", ".ts", ".sh", ".sql"),
)
HUGGING_FACE = "hf:"


class DataError(ValueError):
    """Data that cannot be used; the message names the file (and line) and says what to do."""


@dataclass(frozen=True)
class Document:
    text: str
    id: str
    """``path`` of a text file, ``path:line`` of JSON lines (from 1), ``path#row`` of Parquet (from 0)."""


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


def _files_in(folder: Path) -> list[Path]:
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
            if _kind(path) in (*JSON_LINES, *TEXT, ".parquet"):
                files.append(path)
            else:
                other += 1
    if not files:
        raise DataError(
            f"{folder}: no file in this folder can be used ({other} with other suffixes); "
            f"known are {', '.join((*TEXT[:4], *JSON_LINES, '.parquet'))} ..., also with {', '.join(COMPRESSED)}"
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
        return sorted(_files_in(path))
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


def _json_lines(path: Path, field: str) -> Iterator[Document]:
    with _opened(path) as file:
        number = 0
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            where = f"{path}:{number}"
            text = _decode(line, where)
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: not JSON ({error}); expected one record a line") from None
            if not isinstance(record, dict):
                raise DataError(f"{where}: expected a record {{...}}, got {type(record).__name__}; one record a line")
            if field not in record:
                fields = ", ".join(map(repr, record)) or "none"
                raise DataError(f"{where}: no field {field!r}; the fields are {fields} (set text_field)")
            yield Document(_checked(record[field], field, where), where)
        if number == 0:
            raise DataError(f"{path}: the file is empty")


def _parquet(path: Path, field: str) -> Iterator[Document]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        file = pyarrow.parquet.ParquetFile(path)
        if field not in file.schema_arrow.names:
            names = ", ".join(map(repr, file.schema_arrow.names))
            raise DataError(f"{path}: no column {field!r}; the columns are {names} (set text_field)")
        row = 0
        for batch in file.iter_batches(batch_size=1024, columns=[field]):
            for value in batch.column(0).to_pylist():
                where = f"{path}#{row}"
                yield Document(_checked(value, field, where), where)
                row += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a sound Parquet file: {error}") from None


def _text(path: Path) -> Iterator[Document]:
    with _opened(path) as file:
        yield Document(_decode(file.read(), str(path)).removeprefix("\ufeff"), str(path))


def _hugging_face(source: SourceConfig) -> Iterator[Document]:
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
        where = f"{source.path}#{row}"
        if source.text_field not in record:
            fields = ", ".join(map(repr, record))
            raise DataError(f"{where}: no field {source.text_field!r}; the fields are {fields} (set text_field)")
        yield Document(_checked(record[source.text_field], source.text_field, where), where)


def _read_file(path: Path, field: str, named: bool) -> Iterator[Document]:
    kind = _kind(path)
    # In a folder of many texts an empty one (an empty __init__.py) is a document of nothing, not a damaged file.
    may_be_empty = not named and kind not in JSON_LINES and path.suffix.lower() not in (*COMPRESSED, ".parquet")
    if path.stat().st_size == 0 and not may_be_empty:
        raise DataError(f"{path}: the file is empty")
    if kind == ".parquet":
        return _parquet(path, field)
    return _json_lines(path, field) if kind in JSON_LINES else _text(path)


def read_documents(source: SourceConfig, *, quiet: bool = False) -> Iterator[Document]:
    """The documents of ``source`` in the order of its sorted files; those of only white space are left out.

    How many were left out is logged, unless ``quiet``. Texts come as they are: line ends are not changed.
    """
    files = source_files(source)
    named = len(files) == 1 and files[0] == Path(source.path).expanduser()
    blank = used = 0

    def documents() -> Iterator[Document]:
        if is_hugging_face(source):
            yield from _hugging_face(source)
        for path in files:
            yield from _read_file(path, source.text_field, named)

    for document in documents():
        if document.text.strip():
            used += 1
            yield document
        else:
            blank += 1
    if not used:
        raise DataError(f"{source.path}: no document with text in it ({blank} of only white space)")
    if blank and not quiet:
        logger.info("%s: left out %d documents of only white space", source.path, blank)
