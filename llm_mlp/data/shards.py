"""Documents tokenised once, into memory-mapped files.

A cache folder holds ``manifest.json``, ``tokenizer.json`` and, for source ``i`` and each split, ``i-train.tokens``
(the documents' tokens one after another, no separators), ``i-train.offsets`` (int64 [documents + 1]) and
``i-train.ids`` (JSON lines); of instruction records also ``i-train.mask`` (uint8 [tokens]: what the assistant writes).
The manifest is written last, so a folder without one is not finished.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sys
import time
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from llm_mlp.config import DataConfig, SourceConfig
from llm_mlp.data.chat import TRAINED, ChatError, ChatTemplate
from llm_mlp.data.sources import DataError, Document, is_hugging_face, read_documents, sample_source, source_files
from llm_mlp.data.tokenizer import Tokenizer, read_template

logger = logging.getLogger("llm_mlp.data")

FORMAT_VERSION = 1
SPLITS = ("train", "held_out")
BATCH_CHARS = 1 << 22  # text that is encoded at once
STALE = 24 * 3600  # seconds after which a folder an interrupted run left behind is removed


@dataclass(frozen=True)
class TokenData:
    """The documents of one source and split, memory-mapped. ``offsets`` int64 [documents + 1] cut ``tokens``."""

    tokens: np.ndarray
    offsets: np.ndarray
    bytes: int
    """UTF-8 bytes of all the documents; of instruction records, of their contents."""
    ids_file: Path | None = None
    mask: np.ndarray | None = None
    """Of instruction records, uint8 [tokens]: 1 where the assistant writes the token, so that it is learnt."""

    @property
    def documents(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def doc_ids(self) -> list[str]:
        if self.ids_file is None:
            return [str(i) for i in range(self.documents)]
        return [json.loads(line) for line in self.ids_file.read_text(encoding="utf8").splitlines()]

    def document(self, i: int) -> np.ndarray:
        """The tokens of document ``i``."""
        return self.tokens[self.offsets[i] : self.offsets[i + 1]]

    def counted(self, i: int) -> np.ndarray:
        """Which tokens of record ``i`` the assistant writes, bool."""
        assert self.mask is not None
        return self.mask[self.offsets[i] : self.offsets[i + 1]].astype(bool)


@dataclass(frozen=True)
class Dataset:
    """Tokenised sources, split into training and held-out documents; one entry a source, in the config's order."""

    tokenizer: Tokenizer
    train: list[TokenData]
    held_out: list[TokenData]
    weights: list[float]
    names: list[str]
    parts: dict[str, str] = field(default_factory=dict)
    """What ``fingerprint`` is made of, so that a changed part can be named."""
    folder: Path | None = None

    @property
    def fingerprint(self) -> str:
        """Hash over the sources' contents, the tokenizer and the held-out share."""
        return _hash(self.parts)

    def describe(self) -> dict[str, Any]:
        rows = []
        for name, weight, train, held_out in zip(self.names, self.weights, self.train, self.held_out, strict=True):
            counts = {
                split: {"documents": data.documents, "tokens": len(data.tokens), "bytes": data.bytes}
                for split, data in (("train", train), ("held_out", held_out))
            }
            rows.append({"path": name, "weight": weight, **counts})
        return {
            "vocab_size": self.tokenizer.vocab_size,
            "tokenizer": self.tokenizer.fingerprint(),
            "fingerprint": self.fingerprint,
            "train_tokens": sum(len(data.tokens) for data in self.train),
            "held_out_tokens": sum(len(data.tokens) for data in self.held_out),
            "sources": rows,
        }


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _text_hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def _progress(show: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, disable=not (show and console.is_terminal), transient=True)


# -- what the files held ---------------------------------------------------------------------------------------------


@dataclass
class _FileRecord:
    path: str
    size: int
    mtime_ns: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> _FileRecord:
        stat = path.stat()
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return cls(str(path.absolute()), stat.st_size, stat.st_mtime_ns, digest)

    def same_stat(self) -> bool:
        stat = os.stat(self.path)
        return (stat.st_size, stat.st_mtime_ns) == (self.size, self.mtime_ns)


@dataclass
class _Scan:
    """A source's documents, counted before any is tokenised; damage shows here, not after an hour of work."""

    files: list[_FileRecord]
    content: str
    documents: int
    bytes: int
    smallest: int
    """Smallest hash of a document's text, and how many documents have it."""
    smallest_count: int
    below: int
    """Documents whose hash is below the threshold."""


def _scan(source: SourceConfig, threshold: int, progress: bool) -> _Scan:
    files = [_FileRecord.of(path) for path in source_files(source)]
    digest = hashlib.blake2b(digest_size=32)
    out = _Scan(files, "", 0, 0, 1 << 64, 0, 0)
    with _progress(progress) as bar:
        task = bar.add_task(f"reading {source.path} (documents)", total=None)
        for document in read_documents(source):
            data = document.text.encode()
            value = _text_hash(data)
            digest.update(value.to_bytes(8, "big"))
            out.documents += 1
            out.bytes += len(data)
            out.below += value < threshold
            if value < out.smallest:
                out.smallest, out.smallest_count = value, 0
            out.smallest_count += value == out.smallest
            if out.documents % 256 == 0:
                bar.update(task, completed=out.documents)
    out.content = digest.hexdigest()
    return out


@dataclass(frozen=True)
class _Split:
    """Which documents are held out: by the hash of their text, so order and neighbours do not matter."""

    threshold: int
    forced: int = -1
    """The hash of a document that is held out although the threshold took none."""

    def held_out(self, text: bytes) -> bool:
        value = _text_hash(text)
        return value < self.threshold or value == self.forced


def _split(sources: tuple[SourceConfig, ...], scans: list[_Scan], held_out: float) -> list[_Split]:
    """Which documents of each source are held out. A source of one document (or copies of one) keeps it to train on."""
    splits = []
    for source, scan in zip(sources, scans, strict=True):
        single = scan.documents == scan.smallest_count
        if scan.below == scan.documents and not single:
            raise DataError(
                f"{source.path}: all {scan.documents} documents fall to the held-out part, none is left to train on; "
                f"lower held_out = {held_out} or give the source more documents"
            )
        splits.append(_Split(0 if single else int(held_out * 2**64)))
    if held_out > 0 and not any(scan.below for scan, split in zip(scans, splits, strict=True) if split.threshold):
        # Too few documents for the share: hold out the one with the smallest hash that leaves its source others.
        smallest = [scan.smallest for scan in scans if scan.documents > scan.smallest_count]
        if smallest:
            forced = min(smallest)
            splits = [
                _Split(0, forced) if scan.documents > scan.smallest_count or scan.smallest != forced else _Split(0)
                for scan in scans
            ]
        else:
            logger.warning("nothing is held out: no source has two different documents; split them up to evaluate")
    return splits


# -- writing ---------------------------------------------------------------------------------------------------------


class _Writer:
    """One split of one source."""

    def __init__(self, folder: Path, name: str, dtype: Any, masked: bool) -> None:
        self._dtype, self._folder, self._name = dtype, folder, name
        self._tokens = open(folder / f"{name}.tokens", "wb")  # noqa: SIM115 (closed by close)
        self._mask = open(folder / f"{name}.mask", "wb") if masked else None  # noqa: SIM115
        self._ids = open(folder / f"{name}.ids", "w", encoding="utf8")  # noqa: SIM115
        self._offsets = array("q", [0])
        self._bytes = 0

    def add(self, ids: list[int], document: Document, counted: list[bool] | None = None) -> None:
        np.asarray(ids, dtype=self._dtype).tofile(self._tokens)
        if self._mask is not None:
            np.asarray(counted, dtype=np.uint8).tofile(self._mask)
        self._ids.write(json.dumps(document.id) + "\n")
        self._offsets.append(self._offsets[-1] + len(ids))
        self._bytes += len(document.contents.encode())

    def close(self) -> dict[str, int]:
        """Finish the files; what the manifest says of them."""
        for file in (self._tokens, self._mask, self._ids):
            if file is not None:
                file.close()
        np.asarray(self._offsets, dtype=np.int64).tofile(self._folder / f"{self._name}.offsets")
        kinds = ("tokens", "offsets", "ids", *(["mask"] if self._mask is not None else []))
        sizes = {kind: (self._folder / f"{self._name}.{kind}").stat().st_size for kind in kinds}
        return {"documents": len(self._offsets) - 1, "tokens": self._offsets[-1], "bytes": self._bytes, **{
            f"{kind}_size": size for kind, size in sizes.items()
        }}  # fmt: skip


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _tokenise(
    folder: Path, index: int, source: SourceConfig, scan: _Scan, split: _Split, tokenizer: Tokenizer, progress: bool
) -> dict[str, Any]:
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    template = _usable_template(tokenizer) if source.format == "instruct" else None
    writers = {name: _Writer(folder, f"{index}-{name}", dtype, template is not None) for name in SPLITS}
    with _progress(progress) as bar:
        task = bar.add_task(f"tokenising {source.path} (bytes)", total=scan.bytes)
        for batch in _batches(read_documents(source, quiet=True)):
            rows: Iterable[tuple[list[int], list[bool] | None]]
            if template is None:
                rows = ((ids, None) for ids in tokenizer.encode_batch([d.text for d in batch]))
            else:
                rows = _encoded(batch, template)
            for document, (ids, counted) in zip(batch, rows, strict=True):
                data = document.text.encode()
                writers["held_out" if split.held_out(data) else "train"].add(ids, document, counted)
                bar.advance(task, len(data))
    counts = {name: writer.close() for name, writer in writers.items()}
    if counts["train"]["documents"] + counts["held_out"]["documents"] != scan.documents or not all(
        record.same_stat() for record in scan.files
    ):
        raise DataError(f"{source.path}: changed while it was being read; try again when nothing writes to it")
    return {
        "path": source.path,
        **({"text_field": source.text_field} if template is None else {"format": "instruct"}),
        "content": scan.content,
        "files": [asdict(record) for record in scan.files],
        **counts,
    }


def _usable_template(tokenizer: Tokenizer) -> ChatTemplate:
    try:
        template = ChatTemplate(tokenizer)
        template.check()
    except ChatError as error:
        raise DataError(f"{error}; name another with data.chat_template") from None
    return template


def _encoded(batch: list[Document], template: ChatTemplate) -> Iterator[tuple[list[int], list[bool]]]:
    """Ids of conversations up to the end of the last answer, and which of them the assistant writes."""
    try:
        found = template.encode_batch([document.messages for document in batch])
    except ChatError as error:
        raise DataError(f"{batch[error.number].id}: {error}") from None
    for document, row in zip(batch, found, strict=True):
        if not row.answered:
            raise DataError(f"{document.id}: the chat template changes an answer of this record, or leaves it out")
        yield row.ids[: row.answered], row.counted[: row.answered]


def _training_sample(
    sources: tuple[SourceConfig, ...], weights: list[float], splits: list[_Split], megabytes: float
) -> Iterator[str]:
    """The first training documents of every source, each source's share of the bytes being its weight."""
    for source, weight, split in zip(sources, weights, splits, strict=True):
        left = int(megabytes * 1e6 * weight)
        for document in read_documents(source, quiet=True):
            data = document.text.encode()
            if split.held_out(data):
                continue
            data = document.contents.encode()
            yield document.contents if len(data) <= left else data[:left].decode("utf8", "ignore")
            left -= len(data)
            if left <= 0:
                break


# -- the cache -------------------------------------------------------------------------------------------------------


def _chat_source(config: DataConfig, sources: tuple[SourceConfig, ...], tokenizer: Tokenizer | None) -> str | None:
    """The chat template of a run: the one named, else the tokenizer's own, else ours if there are conversations."""
    if config.chat_template:
        return read_template(Path(config.chat_template))
    if tokenizer is not None and tokenizer.chat_template is not None:
        return tokenizer.chat_template
    return TRAINED if any(source.format == "instruct" for source in sources) else None


def _folder_for(
    config: DataConfig, sources: tuple[SourceConfig, ...], tokenizer: Tokenizer | None, chat: str | None
) -> Path:
    if tokenizer is not None:
        kind: list[Any] = ["tokenizer", tokenizer.fingerprint()]
    else:
        kind = ["bpe", config.vocab_size, config.tokenizer_sample_mb, [source.weight for source in sources]]
    names = tokenizer.token_names if tokenizer else {}
    paths = [
        [
            s.path if is_hugging_face(s) else str(Path(s.path).expanduser().absolute()),
            s.text_field
            if s.format == "text"
            else [s.prompt_field, s.completion_field, s.messages_field, s.columns, _hash([chat, names])],
        ]
        for s in sources
    ]
    return Path(config.cache_dir) / _hash([FORMAT_VERSION, kind, paths, config.held_out])[:16]


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / "manifest.json"
    if not path.is_file():
        if folder.exists():
            logger.info("%s: an unfinished cache; tokenising again", folder)
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf8"))
        version = manifest["format_version"]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path}: not a manifest; delete the folder {folder} to tokenise again") from None
    if version != FORMAT_VERSION:
        logger.info("%s: written in format %s, this is %s; tokenising again", folder, version, FORMAT_VERSION)
        return None
    return manifest


def _changes(manifest: dict[str, Any], folder: Path, sources: tuple[SourceConfig, ...]) -> list[str]:
    """The source files that are not what was tokenised. Files that were only touched get their new time noted."""
    changed, touched = [], False
    for source, entry in zip(sources, manifest["sources"], strict=True):
        known = {record["path"]: record for record in entry["files"]}
        found = {str(path.absolute()): path for path in source_files(source)}
        changed += sorted(known.keys() ^ found.keys())
        for name in known.keys() & found.keys():
            record = _FileRecord(**known[name])
            if record.same_stat():
                continue
            now = _FileRecord.of(found[name])
            if (now.size, now.sha256) != (record.size, record.sha256):
                changed.append(name)
            else:
                known[name].update(asdict(now))
                touched = True
    if touched and not changed:
        _write_json(folder / "manifest.json", manifest)
    return changed


def _write_json(path: Path, value: Any) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1), encoding="utf8")
    os.replace(temporary, path)


def _map(folder: Path, name: str, entry: dict[str, int], dtype: Any) -> TokenData:
    masked = "mask_size" in entry
    for kind in ("tokens", "offsets", "ids", *(["mask"] if masked else [])):
        path = folder / f"{name}.{kind}"
        size = path.stat().st_size if path.is_file() else -1
        if size != entry[f"{kind}_size"]:
            state = f"{size} bytes where the manifest says {entry[f'{kind}_size']}" if size >= 0 else "missing"
            raise DataError(f"{path}: {state}; the cache is damaged, delete the folder {folder} to tokenise again")
    tokens = folder / f"{name}.tokens"
    # An empty file cannot be mapped.
    mapped = np.memmap(tokens, dtype=dtype, mode="r") if entry["tokens"] else np.empty(0, dtype)
    offsets = np.memmap(folder / f"{name}.offsets", dtype=np.int64, mode="r")
    if offsets[-1] != len(mapped) or len(offsets) != entry["documents"] + 1:
        raise DataError(f"{tokens}: does not fit its offsets; delete the folder {folder} to tokenise again")
    mask = None
    if masked:
        mask = np.memmap(folder / f"{name}.mask", np.uint8, "r") if entry["tokens"] else np.empty(0, np.uint8)
        if len(mask) != len(mapped):
            raise DataError(f"{folder / name}.mask: does not fit its tokens; delete the folder {folder}")
    return TokenData(mapped, offsets, entry["bytes"], folder / f"{name}.ids", mask)


def _open(
    folder: Path,
    manifest: dict[str, Any],
    config: DataConfig,
    sources: tuple[SourceConfig, ...],
    given: Tokenizer | None,
    chat: str | None,
) -> Dataset:
    tokenizer = Tokenizer.load(folder)
    if tokenizer.fingerprint() != manifest["tokenizer"]:
        raise DataError(f"{folder}/tokenizer.json: not the one the text was tokenised with; delete the folder {folder}")
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    train, held_out = (
        [_map(folder, f"{i}-{split}", entry[split], dtype) for i, entry in enumerate(manifest["sources"])]
        for split in SPLITS
    )
    parts = {
        "sources": _hash([[e["content"], e.get("text_field", "")] for e in manifest["sources"]]),
        "tokenizer": manifest["tokenizer"],
        "held_out": repr(config.held_out),
    }
    if _has_records(manifest):
        parts["chat_template"] = _hash([tokenizer.chat_template, tokenizer.token_names])
    else:
        # Tokenised texts do not depend on a chat template; a run carries the one of the tokenizer it was given.
        tokenizer = (given or tokenizer).with_chat_template(chat)
    return Dataset(tokenizer, train, held_out, _weights(sources), [s.path for s in sources], parts, folder)


def _has_records(manifest: dict[str, Any]) -> bool:
    return any(entry.get("format") == "instruct" for entry in manifest["sources"])


def _weights(sources: tuple[SourceConfig, ...]) -> list[float]:
    total = sum(source.weight for source in sources)
    return [source.weight / total for source in sources]


def _build(
    folder: Path,
    config: DataConfig,
    sources: tuple[SourceConfig, ...],
    tokenizer: Tokenizer | None,
    chat: str | None,
    progress: bool,
) -> None:
    threshold = int(config.held_out * 2**64)
    scans = [_scan(source, threshold, progress) for source in sources]
    splits = _split(sources, scans, config.held_out)
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f".{folder.name}.*"):
        if time.time() - left.stat().st_mtime > STALE:
            shutil.rmtree(left, ignore_errors=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        if tokenizer is None:
            sample = _training_sample(sources, _weights(sources), splits, config.tokenizer_sample_mb)
            tokenizer = Tokenizer.train(sample, config.vocab_size, progress=progress and sys.stderr.isatty())
        tokenizer = tokenizer.with_chat_template(chat)
        tokenizer.save(temporary)
        entries = [
            _tokenise(temporary, i, source, scan, split, tokenizer, progress)
            for i, (source, scan, split) in enumerate(zip(sources, scans, splits, strict=True))
        ]
        manifest = {"format_version": FORMAT_VERSION, "tokenizer": tokenizer.fingerprint(), "sources": entries}
        _write_json(temporary / "manifest.json", manifest)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            os.replace(temporary, folder)
        except OSError:
            if not (folder / "manifest.json").is_file():  # else another process finished the same work just now
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _configured_tokenizer(config: DataConfig) -> Tokenizer | None:
    """None if it is to be trained."""
    if config.tokenizer == "bpe":
        return None
    return Tokenizer.bytes() if config.tokenizer == "byte" else Tokenizer.load(config.tokenizer)


def _open_prepared(folder: Path, config: DataConfig, tokenizer: Tokenizer | None) -> Dataset:
    """A folder that `prepare` wrote, perhaps elsewhere; the files it was made from are not looked at."""
    manifest = _read_manifest(folder) if folder.is_dir() else None
    if manifest is None:
        raise DataError(f"{folder}: not a folder of prepared data (no manifest.json of format {FORMAT_VERSION})")
    entries = manifest["sources"]
    formats = [entry.get("format", "text") for entry in entries]
    sources = config.sources or tuple(
        SourceConfig(path=entry["files"][0]["path"], format=form) for entry, form in zip(entries, formats, strict=True)
    )
    if len(sources) != len(entries):
        raise DataError(f"{folder}: holds {len(entries)} sources, the config names {len(sources)}")
    if [source.format for source in sources] != formats:
        raise DataError(f"{folder}: holds sources of format {', '.join(formats)}; the config names others")
    if tokenizer is not None and tokenizer.fingerprint() != manifest["tokenizer"]:
        raise DataError(f"{folder}: was tokenised with another tokenizer than the checkpoint's")
    chat = _chat_source(config, (), tokenizer)
    if _has_records(manifest) and chat not in (None, Tokenizer.load(folder).chat_template):
        whose = "data.chat_template" if config.chat_template else "the checkpoint's"
        raise DataError(f"{folder}: was tokenised with another chat template than {whose}; prepare it again with that")
    return _open(folder, manifest, config, sources, tokenizer, chat)


def prepare(config: DataConfig, *, tokenizer: Tokenizer | None = None, progress: bool = True) -> Dataset:
    """Open the tokenised data of ``config``; tokenise first what is new or has changed.

    ``tokenizer``, that of a run to resume or to start from, stands in for the configured one. The data set's tokenizer
    carries the chat template of the run.

    Raises:
        DataError, TokenizerError: naming the file (and line).
    """
    if config.prepared:
        return _open_prepared(Path(config.prepared), config, tokenizer)
    sources = config.sources or (sample_source(),)
    wanted = tokenizer
    if wanted is None:
        wanted = _configured_tokenizer(config)
    chat = _chat_source(config, sources, wanted)
    folders = [_folder_for(config, sources, wanted, chat)]
    if tokenizer is not None and config.tokenizer == "bpe":
        # A resumed run brings the tokenizer that was trained here: its cache serves.
        folders.insert(0, _folder_for(config, sources, None, chat))
    for folder in folders:
        manifest = _read_manifest(folder)
        if manifest is None or (wanted is not None and manifest["tokenizer"] != wanted.fingerprint()):
            continue
        changed = _changes(manifest, folder, sources)
        if not changed:
            return _open(folder, manifest, config, sources, wanted, chat)
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        logger.info("changed since they were tokenised: %s%s; tokenising again", ", ".join(changed[:3]), more)
    _build(folders[-1], config, sources, wanted, chat, progress)
    manifest = _read_manifest(folders[-1])
    assert manifest is not None
    return _open(folders[-1], manifest, config, sources, wanted, chat)
