"""A folder of contexts: immutable objects named by their content, and names that point at them.

``objects/<id>.safetensors`` are contexts; ``names/<name>.json`` say which one a name means and which came before it.
A commit writes the object, then the name, each whole or not at all: whenever a process is killed, every name means a
complete context, the last one whose commit returned or the one before. Bytes are bounded: what is loaded by least
recent use; on disk, objects without a name go first, then earlier versions (which can be made again from the token
ids), and what has a name is never dropped.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from filelock import FileLock
from torch import Tensor

from llm_mlp.context.context import Context, Reader
from llm_mlp.context.format import SUFFIX, ContextError, Manifest, StorageError, read_manifest, token_bytes, whole

FORMAT_VERSION = 1
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
ID = re.compile(r"[0-9a-f]{16}")
log = logging.getLogger("llm_mlp.context")
GIB = 2**30
STALE = 3600  # seconds after which a temporary file is nobody's


def default_folder() -> Path:
    """``$LLM_MLP_CONTEXTS``, else ``$XDG_DATA_HOME/llm-mlp/contexts``, else ``~/.local/share/llm-mlp/contexts``."""
    if own := os.environ.get("LLM_MLP_CONTEXTS"):
        return Path(own)
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "llm-mlp" / "contexts"


@dataclass(frozen=True)
class Entry:
    """A name and what it means."""

    name: str
    id: str
    history: tuple[str, ...]  # ids from the oldest version to this one
    created: str
    expires: str | None
    unfinished: bool  # a text whose reading was interrupted

    @property
    def expired(self) -> bool:
        return self.expires is not None and datetime.fromisoformat(self.expires) <= datetime.now(UTC)


Kind = Literal["prefix", "nothing_stored", "other_model", "no_prefix", "unaligned", "unusable"]


@dataclass(frozen=True)
class Found:
    """What of a prompt is stored already, and why no more: in words, and as one of a few kinds to count by."""

    context: Context | None
    cached_tokens: int
    reason: str
    kind: Kind


@dataclass(frozen=True)
class Undo:
    """What going back takes: the version itself, or the text read again up to ``tokens``, behind ``nearest``."""

    entry: Entry
    now: Context
    tokens: int
    exact: Context | None
    nearest: Context | None
    history: tuple[str, ...]  # versions before it

    @property
    def composable(self) -> bool:
        """Whether the text's map is kept when it is read again."""
        return (self.nearest or self.now).transition is not None


class _Tier:
    """Contexts held in some memory, by the store's folder and their id, the least recently used out first. From any
    thread."""

    def __init__(self, limit: int) -> None:
        self.limit, self._bytes = limit, 0
        self._held: OrderedDict[tuple[Path, str], Context] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, folder: Path, id_: str) -> Context | None:
        with self._lock:
            if (folder, id_) in self._held:
                self._held.move_to_end((folder, id_))
            return self._held.get((folder, id_))

    def put(self, folder: Path, context: Context) -> None:
        with self._lock:
            if context.bytes > self.limit or (folder, context.id) in self._held:
                return
            self._held[folder, context.id] = context
            self._bytes += context.bytes
            while self._bytes > self.limit:
                self._bytes -= self._held.popitem(last=False)[1].bytes

    def drop(self, folder: Path, id_: str) -> None:
        with self._lock:
            if gone := self._held.pop((folder, id_), None):
                self._bytes -= gone.bytes

    def held(self, folder: Path) -> list[Context]:
        """Those of one store."""
        with self._lock:
            return [context for (own, _), context in self._held.items() if own == folder]


class Loaded:
    """Contexts that are held loaded, in memory and on the model's GPU, within limits of bytes that several stores share
    (none gets what another one has loaded)."""

    def __init__(self, ram_bytes: int = 2 * GIB, device_bytes: int = GIB) -> None:
        self.ram, self.device = _Tier(ram_bytes), _Tier(device_bytes)


class Store:
    """Contexts in a folder, for any number of processes.

    Args:
        folder: made if it is not there. disk_bytes: of all objects. snapshot_bytes: of earlier versions among them.
        loaded: where loaded contexts are held; None: a `Loaded` of its own.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        disk_bytes: int = 50 * GIB,
        snapshot_bytes: int = 10 * GIB,
        loaded: Loaded | None = None,
    ) -> None:
        self.folder = Path(folder) if folder is not None else default_folder()
        self.disk_bytes, self.snapshot_bytes = disk_bytes, snapshot_bytes
        self._objects, self._names = self.folder / "objects", self.folder / "names"
        try:
            for part in (self._objects, self._names):
                part.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ContextError(f"{self.folder}: cannot be made a context store ({error})") from None
        self._loaded = loaded or Loaded()
        self._manifests: dict[str, Manifest] = {}
        self._lock = FileLock(self.folder / ".lock")

    # -- names -----------------------------------------------------------------------------------------------------

    def entries(self) -> list[Entry]:
        """All names, in order; expired and damaged ones are not among them, the latter are logged."""
        return self._scan()[0]

    def _scan(self) -> tuple[list[Entry], bool]:
        """The names, and whether all could be read: where one could not, nobody knows what it needs."""
        found, sound = [], True
        for name in sorted(path.stem for path in self._names.glob("*.json") if not path.name.startswith(".")):
            try:
                entry = self._entry(name)
            except ContextError as error:
                log.warning("%s", error)
                sound = False
            else:
                found += [entry] if entry is not None and not entry.expired else []
        return found, sound

    def look(self, name: str) -> Entry | None:
        """What a name means; None if there is no such name or it has expired."""
        found = self._entry(_checked(name))
        return None if found is None or found.expired else found

    def entry(self, name: str) -> Entry:
        """What a name means.

        Raises:
            ContextError: no such name, an expired one, or one that is not allowed.
        """
        found = self.look(name)
        if found is None:
            known = ", ".join(e.name for e in self.entries()[:8]) or "none"
            raise ContextError(f"context {name!r} does not exist in {self.folder} (or has expired); there are: {known}")
        return found

    def _entry(self, name: str) -> Entry | None:
        path = self._names / f"{name}.json"
        try:
            row = json.loads(path.read_text(encoding="utf8"))
            if row.get("format_version") != FORMAT_VERSION:
                raise ContextError(f"{path}: format_version {row.get('format_version')!r}; this version reads 1")
            ids = [row["id"], *row["history"]]
            if not isinstance(row["history"], list) or not all(isinstance(i, str) and ID.fullmatch(i) for i in ids):
                raise ValueError("an id is no id")
            if row["expires"] is not None and datetime.fromisoformat(row["expires"]).tzinfo is None:
                raise ValueError("expires has no time zone")
            return Entry(
                name, row["id"], tuple(row["history"]), str(row["created"]), row["expires"], bool(row["unfinished"])
            )
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, ContextError):
                raise
            raise ContextError(f"{path}: damaged ({error}); restore or remove that file") from None

    def _point(self, entry: Entry) -> None:
        row = {k: v for k, v in vars(entry).items() if k != "name"} | {"format_version": FORMAT_VERSION}
        with whole(self._names / f"{entry.name}.json") as temporary:
            temporary.write_text(json.dumps(row, indent=1) + "\n", encoding="utf8")

    # -- contexts --------------------------------------------------------------------------------------------------

    def _path(self, id_: str) -> Path:
        return self._objects / f"{id_}{SUFFIX}"

    def manifests(self) -> dict[str, Manifest]:
        """Of every object, by id. Files that are no contexts are passed over."""
        there = {path.stem for path in self._objects.glob(f"*{SUFFIX}") if not path.name.startswith(".")}
        self._manifests = {id_: m for id_, m in self._manifests.items() if id_ in there}
        for id_ in there - self._manifests.keys():
            with contextlib.suppress(ContextError):
                self._manifests[id_] = read_manifest(self._path(id_))
        return dict(self._manifests)

    def manifest(self, name: str) -> Manifest:
        """Of what a name means."""
        return read_manifest(self._path(self.entry(name).id))

    def get(self, name: str, reader: Reader | None = None) -> Context:
        """The context that a name means; with a ``reader`` checked against its model, the state on its device.

        Raises:
            ContextError: no such name, a damaged file, or a context of another model.
        """
        return self._load(self.entry(name).id, reader)

    def _load(self, id_: str, reader: Reader | None = None) -> Context:
        gpu = reader is not None and reader.device.type != "cpu"
        held = self._loaded.device.get(self.folder, id_) if gpu else None
        if held is not None and reader is not None:
            reader.check(held.manifest)
            return held
        found = self._loaded.ram.get(self.folder, id_)
        if found is None:
            found = Context.load(self._path(id_))
            if found.id != id_:
                raise ContextError(f"{self._path(id_)}: holds context {found.id}; the file was renamed or replaced")
            self._loaded.ram.put(self.folder, found)
        with contextlib.suppress(OSError):
            os.utime(self._path(id_))  # used just now
        if reader is None:
            return found
        found = reader.adopt(found)
        if gpu:
            self._loaded.device.put(self.folder, found)
        return found

    def commit(
        self,
        context: Context,
        name: str | None = None,
        *,
        expires: timedelta | None = None,
        replace: bool = False,
        unfinished: bool = False,
        versions: Sequence[str] = (),
    ) -> str:
        """Store a context, under a name if there is one; its id. When this returns it outlives a crash.

        A name's next version has to continue its last one, unless ``replace``. ``versions``: ids of those between that
        one and this, oldest first.

        Raises:
            ContextError: a name that is taken or not allowed. StorageError: no room, or it could not be written.
        """
        with self._lock:
            before = self.look(name) if name is not None else None
            if before is not None and not replace and context.manifest.parent != before.id != context.id:
                raise ContextError(f"context {name!r} exists and means another text; choose another name")
            if not self._path(context.id).exists():
                self._make_room(context.bytes, keep={context.id, *([before.id] if before else [])})
                context.save(self._path(context.id))
            self._loaded.ram.put(self.folder, context.to("cpu"))
            if name is not None:
                history = (*(before.history if before and not replace else ()), *versions)
                if not history or history[-1] != context.id:
                    history = (*history, context.id)
                until = (datetime.now(UTC) + expires).isoformat() if expires is not None else None
                until = until or (before.expires if before else None)
                made = before.created if before else context.manifest.created
                self._point(Entry(name, context.id, history, made, until, unfinished))
                if before is not None and replace:
                    self._drop({before.id, *before.history})
            self._make_room(0, keep={context.id})
        return context.id

    def _drop(self, ids: set[str]) -> None:
        """Delete those of ``ids`` that no name needs."""
        entries, sound = self._scan()
        for id_ in ids - {i for e in entries for i in (e.id, *e.history)} if sound else ():
            self._delete(id_)

    def versions(self, name: str, context: Context) -> tuple[str, ...]:
        """Ids of the versions of a name up to the one that ``context`` is or continues, oldest first; none where there
        is no such version, or no such name."""
        entry = self.look(name)
        history = () if entry is None else entry.history
        at = next((history.index(id_) for id_ in (context.id, context.manifest.parent) if id_ in history), -1)
        return history[: at + 1]

    def fork(self, name: str, new: str) -> Entry:
        """Another name for the same context: nothing is copied, both go their own way from here.

        Raises:
            ContextError: no such name, or the new one is taken or not allowed.
        """
        with self._lock:
            entry = self.entry(name)
            if self.look(new) is not None:
                raise ContextError(f"context {new!r} exists; choose another name")
            now = datetime.now(UTC).isoformat(timespec="seconds")
            made = Entry(new, entry.id, entry.history, now, None, entry.unfinished)
            self._point(made)
        return made

    def undo(self, name: str, reader: Reader, *, steps: int = 1, tokens: int | None = None) -> Context:
        """Go back to an earlier mark: ``steps`` marks before the end, or the one at ``tokens``.

        A version that is still stored is taken as it was; else the text is read again up to there, from the nearest
        earlier version, and the context says so (`Manifest.replayed`).

        Raises:
            ContextError: no such mark, or the model does not fit.
        """
        plan = self.plan_undo(name, reader, steps=steps, tokens=tokens)
        return self.go_back(plan, plan.exact or reader.replay(plan.now, plan.tokens, plan.nearest))

    def plan_undo(self, name: str, reader: Reader, *, steps: int = 1, tokens: int | None = None) -> Undo:
        """`undo` up to where a text may have to be read again, which `Reader.replay` does, or somebody who has to let
        others use the model meanwhile; then `go_back`. Raises as `undo`."""
        entry = self.entry(name)
        now = self._load(entry.id)
        reader.check(now.manifest)
        marks = [m for m in now.manifest.marks if m < now.manifest.tokens]
        if tokens is None:
            if not 1 <= steps <= len(marks):
                raise ContextError(f"context {name!r} has {len(marks)} marks to go back to, not {steps}")
            tokens = marks[-steps]
        elif tokens not in marks:
            known = ", ".join(map(str, marks[-8:])) or "none"
            raise ContextError(f"context {name!r} has no mark at {tokens} tokens; the last ones: {known}")
        stored = self.manifests()
        older = [(stored[id_].tokens, id_) for id_ in entry.history if id_ in stored and stored[id_].tokens <= tokens]
        # An interrupted version of the same text may be as long without being a mark's; the newest counts.
        same = [id_ for n, id_ in older if n == tokens]
        exact = self._load(same[-1], reader) if same else None
        nearest = self._load(max(older)[1], reader) if older and exact is None else None
        if exact is nearest is None and now.manifest.composed:
            raise ContextError(f"context {name!r} is composed and no earlier version of it is stored any more")
        return Undo(entry, now, tokens, exact, nearest, tuple(id_ for n, id_ in older if n < tokens))

    def go_back(self, plan: Undo, made: Context) -> Context:
        """Let the name mean ``made``, the version that was gone back to.

        Raises:
            ContextError: the name means something else by now, or there is no room.
        """
        entry, name = plan.entry, plan.entry.name
        with self._lock:
            if self.look(name) != entry:
                raise ContextError(f"context {name!r} was changed by another process meanwhile; try again")
            if not self._path(made.id).exists():
                self._make_room(made.bytes, keep={made.id, entry.id})
                made.save(self._path(made.id))
            self._point(Entry(name, made.id, (*plan.history, made.id), entry.created, entry.expires, False))
        return made

    def remove(self, name: str) -> None:
        """Forget a name; its objects go when no other name needs them (`gc`)."""
        with self._lock:
            path = self._names / f"{_checked(name)}.json"
            if not path.exists():
                self.entry(name)  # says what there is
            path.unlink(missing_ok=True)
        self.gc()

    # -- long readings ---------------------------------------------------------------------------------------------

    def keep_reading(self, context: Context, name: str, *, expires: timedelta | None = None) -> None:
        """Store what is read so far of a text that is on its way into ``name``, in place of what was kept before.

        Raises:
            ContextError: a context of the user's own has that name. StorageError: no room, or it could not be written.
        """
        with self._lock:
            there = self.look(reading_name(name))
            if there is not None and not there.unfinished:
                raise ContextError(
                    f"context {there.name!r} is in the way of what is kept of the reading into {name!r}; give it "
                    "another name (`context fork`, `context rm`)"
                )
            self.commit(context, reading_name(name), expires=expires, replace=True, unfinished=True)

    def begun(self, name: str, reader: Reader) -> Context | None:
        """What an interrupted reading into ``name`` has left; `Reader.check_begun` says whether it is of the same text.

        Raises:
            ContextError: a damaged file, or of another model.
        """
        there = self.look(reading_name(name))
        return self._load(there.id, reader) if there is not None and there.unfinished else None

    def forget_reading(self, name: str) -> None:
        """Remove what `keep_reading` has kept, where there is any."""
        there = self.look(reading_name(name))
        if there is not None and there.unfinished:
            self.remove(there.name)

    # -- files -----------------------------------------------------------------------------------------------------

    def export(self, name: str, path: str | Path) -> None:
        """Write a context's file elsewhere."""
        self._load(self.entry(name).id).save(path)

    def open(self, name: str) -> tuple[BinaryIO, str]:
        """A context's file, checked and opened for reading, and its id. It can be read to its end whatever happens to
        the name meanwhile."""
        context = self._load(self.entry(name).id)
        try:
            return self._path(context.id).open("rb"), context.id
        except OSError as error:
            raise ContextError(f"context {name!r}: its file cannot be read ({error.strerror})") from None

    @contextlib.contextmanager
    def incoming(self) -> Iterator[BinaryIO]:
        """A temporary file in the folder, for what is to be imported; it goes at the end of the ``with`` block, or is
        one of those that `gc` removes.

        Raises:
            StorageError: the disk failed, here or in the ``with`` block.
        """
        try:
            with tempfile.NamedTemporaryFile(dir=self._objects, prefix=".", suffix=".tmp") as file:
                yield file  # type: ignore[misc]
        except OSError as error:
            raise StorageError(f"{self.folder}: the file cannot be kept ({error.strerror})") from None

    def import_(self, path: str | Path, name: str, *, replace: bool = False) -> Context:
        """Take a context's file in under a name.

        Raises:
            ContextError: a file that is no context, cut or altered; a name that is taken.
        """
        context = examine(path)
        self.take(context, name, replace=replace)
        return context

    def take(self, context: Context, name: str, *, replace: bool = False, expires: timedelta | None = None) -> None:
        """Store an examined context under a name, over a damaged copy of it if there is one.

        Raises:
            ContextError: a name that is taken, no room.
        """
        with self._lock:
            try:
                self._loaded.ram.drop(self.folder, context.id)
                self._load(context.id)
            except ContextError:  # not there, or damaged: this is a good copy
                self._path(context.id).unlink(missing_ok=True)
            self.commit(context, name, replace=replace, expires=expires)

    # -- looking up ------------------------------------------------------------------------------------------------

    def find(self, tokens: Sequence[int] | Tensor, reader: Reader, *, pieces: int | None = None) -> Found:
        """The stored context of this model whose text is the longest beginning of ``tokens``, or all of them.

        ``pieces``: only one that reading ``tokens`` from the start in such pieces would come by, to the bit
        (`Manifest.pieces`).
        """
        ids = torch.as_tensor(tokens, dtype=torch.int64).flatten()
        manifests = self.manifests()
        if not manifests:
            return Found(None, 0, "miss: nothing is stored", "nothing_stored")
        own = reader.fingerprints
        fitting = {
            (m.tokens, m.text): id_
            # Of two of one text the better comes last: one read so, one that was kept.
            for id_, m in sorted(manifests.items(), key=lambda item: (item[1].pieces == pieces, not item[1].replayed))
            if not m.composed and all(getattr(m, what) == value for what, value in own.items())
        }
        if not fitting:
            reason = f"miss: none of {len(manifests)} stored contexts is of this model and tokenizer"
            return Found(None, 0, reason, "other_model")
        data, running, done = token_bytes(ids), hashlib.sha256(), 0
        matches: list[str] = []
        for length in sorted({n for n, _ in fitting if n <= len(ids)}):
            running.update(data[4 * done : 4 * length])
            done = length
            if (length, digest := running.copy().hexdigest()) in fitting:
                matches.append(fitting[length, digest])
        kind: Kind = "no_prefix"
        reason = f"miss: none of {len(fitting)} stored texts begins this prompt"
        if matches and pieces is not None:
            longest = manifests[matches[-1]].tokens
            matches = [i for i in matches if manifests[i].pieces == pieces and manifests[i].tokens % pieces == 0]
            reason = f"miss: {longest} tokens are stored, but not as read in pieces of {pieces} up to the end of one"
            kind = "unaligned"
        for id_ in reversed(matches):
            try:
                context = self._load(id_, reader)
            except ContextError as error:  # damaged, or gone meanwhile: a request can do without
                reason = f"miss: {error}"
                continue
            n = len(context.tokens)
            return Found(context, n, f"hit: {n} of {len(ids)} tokens from {id_}", "prefix")
        return Found(None, 0, reason, "unusable" if matches else kind)

    # -- room ------------------------------------------------------------------------------------------------------

    def usage(self) -> dict[str, int]:
        """Bytes and counts: objects on disk, those that are earlier versions, what is held loaded."""
        sizes = self._sizes()
        heads = {e.id for e in self.entries()}
        older = {id_ for e in self.entries() for id_ in e.history} - heads
        ram = self._loaded.ram.held(self.folder)
        return {
            "disk_bytes": sum(sizes.values()),
            "objects": len(sizes),
            "snapshot_bytes": sum(sizes.get(id_, 0) for id_ in older),
            "ram_bytes": sum(c.bytes for c in ram),
            "ram_contexts": len(ram),
            "device_bytes": sum(c.bytes for c in self._loaded.device.held(self.folder)),
        }

    def gc(self) -> dict[str, int]:
        """Remove expired names, objects that no name needs, and temporary files nobody writes any more."""
        removed = {"names": 0, "objects": 0, "temporary": 0, "bytes": 0}
        with self._lock:
            for path in self._names.glob("*.json"):
                with contextlib.suppress(ContextError):
                    entry = self._entry(path.stem)
                    if entry is not None and entry.expired:
                        path.unlink(missing_ok=True)
                        removed["names"] += 1
            entries, sound = self._scan()
            needed = {id_ for e in entries for id_ in (e.id, *e.history)}
            for id_, size in self._sizes().items():
                if sound and id_ not in needed:
                    self._delete(id_)
                    removed["objects"] += 1
                    removed["bytes"] += size
            for folder in (self._objects, self._names):
                for path in folder.glob(".*.tmp"):
                    with contextlib.suppress(OSError):
                        if time.time() - path.stat().st_mtime > STALE:
                            path.unlink()
                            removed["temporary"] += 1
        return removed

    def _sizes(self) -> dict[str, int]:
        found = {}
        for path in self._objects.glob(f"*{SUFFIX}"):
            with contextlib.suppress(OSError):
                if not path.name.startswith("."):
                    found[path.stem] = path.stat().st_size
        return found

    def _delete(self, id_: str) -> None:
        self._path(id_).unlink(missing_ok=True)
        self._manifests.pop(id_, None)
        self._loaded.ram.drop(self.folder, id_)
        self._loaded.device.drop(self.folder, id_)

    def _make_room(self, wanted: int, keep: set[str]) -> None:
        """Drop objects until ``wanted`` more bytes fit, and earlier versions until they are within their budget."""
        sizes = self._sizes()
        entries, sound = self._scan()
        heads = {e.id for e in entries}
        older = {id_ for e in entries for id_ in e.history} - heads
        snapshots = sum(sizes.get(id_, 0) for id_ in older)
        over = sum(sizes.values()) + wanted - self.disk_bytes
        gone: list[str] = []
        for id_ in self._oldest(set(sizes) - heads - older - keep):
            if over > 0:
                over -= sizes[id_]
                gone.append(id_)
        for id_ in self._oldest((older & set(sizes)) - keep):
            if over > 0 or snapshots > self.snapshot_bytes:
                over -= sizes[id_]
                snapshots -= sizes[id_]
                gone.append(id_)
        if wanted and (over > 0 or (gone and not sound)):
            why = "" if sound else "; a damaged name keeps everything in place"
            raise StorageError(
                f"{self.folder}: no room for {wanted:,} bytes more within {self.disk_bytes:,} (the contexts that have "
                f"names take {sum(sizes.get(h, 0) for h in heads):,}){why}; remove some or raise the limit"
            )
        if sound:
            for id_ in gone:
                self._delete(id_)

    def _oldest(self, ids: set[str]) -> Iterator[str]:
        """By last use."""

        def used(id_: str) -> float:
            try:
                return self._path(id_).stat().st_mtime
            except OSError:
                return 0.0

        return iter(sorted(ids, key=used))


def examine(path: str | Path, reader: Reader | None = None) -> Context:
    """A context of a file that anybody may have written; with a ``reader`` only one of its model.

    Raises:
        ContextError: a file that is no context, cut or altered, with numbers that are none, or of another model.
    """
    context = Context.load(path)
    for part, t in context.tensors().items():
        empty = part.endswith((".scores", ".log_a"))  # of an empty slot, and of a gate that forgets all
        t = t.float() if t.dtype.itemsize == 1 else t  # torch does not ask 8-bit floats
        if not bool((t.isfinite() | (t == -torch.inf) if empty else t.isfinite()).all()):
            raise ContextError(f"{path}: {part} holds numbers that are not finite")
    if reader is not None:
        reader.fit(context)
    return context


def _checked(name: str) -> str:
    if not NAME.fullmatch(name) or name.endswith(".json"):
        raise ContextError(
            f"{name!r} is no name for a context: letters, digits, '.', '_' and '-' are allowed, a letter or digit "
            "first, at most 128 (a file is taken in by `context import`)"
        )
    return name


def reading_name(name: str) -> str:
    """Of what is stored while a long text is read into ``name``, which means nothing until all is read."""
    return f"{name[:120]}.reading"


def summary(entry: Entry, manifest: Manifest | None) -> dict[str, Any]:
    """A row of `llm-mlp context ls`."""
    return {
        "name": entry.name,
        "id": entry.id,
        "tokens": manifest.tokens if manifest else None,
        "created": entry.created,
        "expires": entry.expires,
        "unfinished": entry.unfinished,
        "versions": len(entry.history),
        "replayed": manifest.replayed if manifest else None,
        "device": manifest.device if manifest else None,
        "weights": manifest.weights if manifest else None,
    }
