"""Tokens in batches. A batch is a pure function of the global index of its first sample.

The state of a run in its data is therefore one integer, and any process can make any range of the samples. Nothing
but permutations is computed: a batch is read from the memory-mapped tokens.

A source's documents, in the shuffled order of an epoch, make one sequence ``eos doc eos doc ... doc eos``. Sample
``w`` of an epoch predicts its positions ``w*T + 1 .. w*T + T``; so each token is predicted once an epoch.

Instruction records are not cut into windows: a sample is a row of whole records, each a sequence of its own that
starts with an eos, and only what the assistant writes is predicted. Each record is read once an epoch.
"""

from __future__ import annotations

import heapq
import logging
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llm_mlp.config import ConfigError, DataConfig
from llm_mlp.data.shards import Dataset, TokenData
from llm_mlp.data.sources import DataError

logger = logging.getLogger("llm_mlp.data")

FORMAT_VERSION = 1
IGNORED = -100  # target of a position that does not count (torch's ignore_index)


@dataclass
class Batch:
    """``tokens`` and ``targets`` int64 [B, T], or [1, B*T] with ``cu_seqlens`` (int32 on the CPU, [N + 1])."""

    tokens: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor | None
    carried: list[int] | None
    """Streams: of each of the N sequences the stream whose state it continues, or -1 where it starts afresh."""
    last: list[int] | None
    """Streams: of each stream its last sequence in this batch, or -1 if the batch has none of it."""
    sample_ids: list[int]


def permutation(count: int, *key: int) -> np.ndarray:
    """A permutation of ``count`` that depends on ``key`` alone.

    Sorts raw Philox output, which numpy keeps the same for ever; `Generator.permutation` may change.
    """
    bits = np.random.Philox(np.random.SeedSequence([value % 2**64 for value in key]))
    return np.argsort(bits.random_raw(count), kind="stable")


class Concatenation:
    """Documents in a given order, each behind an ``eos``, and one ``eos`` at the end."""

    def __init__(self, data: TokenData, order: np.ndarray, eos: int) -> None:
        self._data, self._order, self._eos = data, order, eos
        # [documents + 1]: where each document's eos stands; the last is the final eos.
        self.starts = np.zeros(len(order) + 1, dtype=np.int64)
        np.cumsum(np.diff(data.offsets)[order] + 1, out=self.starts[1:])

    def __len__(self) -> int:
        """Tokens to predict."""
        return int(self.starts[-1])

    def windows(self, length: int) -> int:
        return -(-len(self) // length)

    def read(self, start: int, out: np.ndarray) -> tuple[int, np.ndarray]:
        """Fill ``out`` with the tokens from ``start`` on, behind the end with eos.

        Returns how many were there, and where in ``out`` the eos of documents (or of the end) stand.
        """
        stop = min(start + len(out), len(self) + 1)
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        end = int(np.searchsorted(self.starts, stop, side="left"))
        starts = self.starts[first:end]
        filled = stop - start
        # The final eos is the start of no document.
        documents = self._order[first : min(end, len(self._order))]
        edges = np.clip(self.starts[first : first + len(documents) + 1], start, stop)
        shift = self._data.offsets[documents] - starts[: len(documents)] - 1
        index = np.repeat(shift, np.diff(edges)) + np.arange(start, edges[-1])
        out[filled:] = self._eos
        out[: len(index)] = self._data.tokens[np.maximum(index, 0)] if len(self._data.tokens) else self._eos
        boundaries = starts[starts >= start] - start
        out[boundaries] = self._eos
        return filled, boundaries

    def window(self, number: int, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Window ``number`` into ``tokens`` and ``targets`` [T]; where in them the eos of documents stand."""
        row = np.empty(len(tokens) + 1, dtype=np.int64)
        filled, boundaries = self.read(number * len(tokens), row)
        tokens[:], targets[:] = row[:-1], row[1:]
        targets[filled - 1 :] = IGNORED
        return boundaries


class _Source(ABC):
    """The samples of one source, shuffled anew every epoch."""

    per_epoch: int

    @abstractmethod
    def read(self, sample: int, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Fill ``tokens`` and ``targets`` [T]; returns where in them documents (or what is empty) start."""


class _Shuffled(_Source):
    """Windows over texts."""

    def __init__(self, data: TokenData, seq_len: int, seed: int, number: int, eos: int) -> None:
        self._data, self._length, self._eos, self._key = data, seq_len, eos, (seed, number)
        self.per_epoch = -(-(len(data.tokens) + data.documents) // seq_len)
        self._epochs: dict[int, tuple[Concatenation, np.ndarray]] = {}

    def _epoch(self, epoch: int) -> tuple[Concatenation, np.ndarray]:
        if epoch not in self._epochs:
            seed, number = self._key
            order = permutation(self._data.documents, seed, epoch, number, 0)
            made = Concatenation(self._data, order, self._eos), permutation(self.per_epoch, seed, epoch, number, 1)
            # A batch may reach over the end of an epoch; older ones are not needed.
            self._epochs = {**{e: known for e, known in self._epochs.items() if abs(e - epoch) == 1}, epoch: made}
        return self._epochs[epoch]

    def read(self, sample: int, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
        epoch, window = divmod(sample, self.per_epoch)
        text, order = self._epoch(epoch)
        return text.window(int(order[window]), tokens, targets)


class _InOrder(_Source):
    """Windows over texts as they are stored, the same in every epoch."""

    def __init__(self, data: TokenData, seq_len: int, eos: int) -> None:
        self._text = Concatenation(data, np.arange(data.documents), eos)
        self.per_epoch = self._text.windows(seq_len)

    def read(self, sample: int, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
        return self._text.window(sample % self.per_epoch, tokens, targets)


def _best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Rows of ``capacity`` for things of ``lengths`` (longest first): the row of each, and how many rows there are.

    Each goes where the least room is left that it fits in. Longest first, little stays empty.
    """
    rows: list[list[int]] = [[] for _ in range(capacity + 1)]  # by the room that is left in them
    some, count = 0, 0  # bit r: there is a row with room r
    out = np.empty(len(lengths), dtype=np.int64)
    for n, length in enumerate(lengths.tolist()):
        fitting = some >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = rows[room].pop()
            if not rows[room]:
                some ^= 1 << room
        else:
            row, room, count = count, capacity, count + 1
        out[n] = row
        if room > length:
            rows[room - length].append(row)
            some |= 1 << (room - length)
    return out, count


class _Records(_Source):
    """Rows of whole instruction records.

    Which lengths share a row is decided once, over all records, so that an epoch has as many rows as any other and
    a sample's epoch is a division. An epoch deals out the records of each length anew, and shuffles the rows.
    What else is in a row makes no difference to a record.
    """

    def __init__(self, data: TokenData, seq_len: int, seed: int, number: int, eos: int) -> None:
        self._data, self._length, self._eos, self._key = data, seq_len, eos, (seed, number)
        lengths = np.diff(data.offsets)
        self.cut = np.flatnonzero(lengths > seq_len)
        self.left_out = np.array([i for i in self.cut.tolist() if not data.counted(i)[:seq_len].any()], dtype=np.int64)
        self.cut = np.setdiff1d(self.cut, self.left_out)
        self.records = np.setdiff1d(np.arange(data.documents), self.left_out)
        self._lengths = np.minimum(lengths, seq_len)
        row_of, self.per_epoch = _best_fit(np.sort(self._lengths[self.records])[::-1], seq_len)
        # Of each row the places, in the order of falling length, whose records it holds.
        self._places = np.split(np.argsort(row_of, kind="stable"), np.cumsum(np.bincount(row_of))[:-1])
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    @property
    def fill(self) -> float:
        """Share of the rows that holds tokens."""
        return float(self._lengths[self.records].sum()) / max(1, self.per_epoch * self._length)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The records by falling length, those of one length in any order; the rows in any order."""
        if epoch not in self._epochs:
            seed, number = self._key
            records = self.records[permutation(len(self.records), seed, epoch, number, 0)]
            records = records[np.argsort(-self._lengths[records], kind="stable")]
            made = records, permutation(self.per_epoch, seed, epoch, number, 1)
            self._epochs = {**{e: known for e, known in self._epochs.items() if abs(e - epoch) == 1}, epoch: made}
        return self._epochs[epoch]

    def read(self, sample: int, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
        epoch, place = divmod(sample, self.per_epoch)
        records, order = self._epoch(epoch)
        tokens[:], targets[:] = self._eos, IGNORED
        starts, at = [], 0
        for record in records[self._places[order[place]]].tolist():
            n = int(self._lengths[record])
            ids, counted = self._data.document(record)[:n], self._data.counted(record)[:n]
            starts.append(at)
            tokens[at + 1 : at + n] = ids[:-1]  # behind the eos that starts a text
            targets[at : at + n][counted] = ids[counted]
            at += n
        return np.array([*starts, at], dtype=np.int64)


class _Streams:
    """One source's documents, dealt to ``count`` streams, each of which reads on for ever.

    Each document goes to the stream that is shortest so far, epoch after epoch, so the streams stay equally long.
    """

    def __init__(self, data: TokenData, count: int, seed: int, number: int, eos: int) -> None:
        self._data, self._eos, self._key = data, eos, (seed, number)
        self._epoch = 0
        self._lengths = np.diff(data.offsets) + 1
        self._shortest = [(0, stream) for stream in range(count)]
        self._documents: list[list[int]] = [[] for _ in range(count)]
        self._starts: list[list[int]] = [[0] for _ in range(count)]

    def _deal(self) -> None:
        seed, number = self._key
        for document in permutation(self._data.documents, seed, self._epoch, number, 0).tolist():
            length, stream = self._shortest[0]
            length += int(self._lengths[document])
            heapq.heapreplace(self._shortest, (length, stream))
            self._documents[stream].append(document)
            self._starts[stream].append(length)
        self._epoch += 1

    def read(self, stream: int, start: int, out: np.ndarray) -> np.ndarray:
        """Fill ``out`` with the stream's tokens from ``start`` on; where in ``out`` documents start."""
        stop = start + len(out)
        while self._starts[stream][-1] < stop:
            self._deal()
        starts, boundaries = self._starts[stream], []
        i = bisect_right(starts, start) - 1
        while starts[i] < stop:
            begin = starts[i]
            if begin >= start:
                out[begin - start] = self._eos
                boundaries.append(begin - start)
            a, b = max(start, begin + 1), min(stop, starts[i + 1])
            if b > a:
                offset = int(self._data.offsets[self._documents[stream][i]]) - begin - 1
                out[a - start : b - start] = self._data.tokens[offset + a : offset + b]
            i += 1
        return np.array(boundaries, dtype=np.int64)


class _Mixture:
    """Which source a global sample is from, and how many of that source came before.

    The golden-ratio sequence ``i * phi mod 1`` is spread evenly over any stretch, so the shares are the weights after
    few samples; counts at block boundaries make any sample accessible.
    """

    BLOCK = 1 << 16
    PHI = 0x9E3779B97F4A7C15  # 2^64 / golden ratio

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        self._edges = np.cumsum(weights)[:-1] / sum(weights)
        self._seed = int(np.random.Philox(np.random.SeedSequence([seed % 2**64, 0x6D6978])).random_raw())
        self._counts = [np.zeros(len(weights), dtype=np.int64)]  # of each source, before block n
        self._block: tuple[int, np.ndarray, np.ndarray] | None = None

    def _sources(self, block: int) -> np.ndarray:
        i = np.arange(block * self.BLOCK, (block + 1) * self.BLOCK, dtype=np.uint64)
        place = i * np.uint64(self.PHI) + np.uint64(self._seed)
        return np.searchsorted(self._edges, place / 2.0**64, side="right")

    def __call__(self, i: int) -> tuple[int, int]:
        """Source of sample ``i``, and its index among the samples of that source."""
        if not len(self._edges):
            return 0, i
        block, at = divmod(i, self.BLOCK)
        if self._block is None or self._block[0] != block:
            while len(self._counts) <= block:
                found = self._sources(len(self._counts) - 1)
                self._counts.append(self._counts[-1] + np.bincount(found, minlength=len(self._edges) + 1))
            sources = self._sources(block)
            local = np.empty(self.BLOCK, dtype=np.int64)
            for source, before in enumerate(self._counts[block]):
                here = sources == source
                local[here] = before + np.arange(here.sum())
            self._block = block, sources, local
        return int(self._block[1][at]), int(self._block[2][at])


def _share_streams(weights: Sequence[float], batch_size: int) -> list[int]:
    """How many of the streams each source gets: at least one, else by weight (largest remainder)."""
    if batch_size < len(weights):
        raise DataError(
            f"packing streams gives every source a stream of its own: {len(weights)} sources need a batch_size of at "
            f"least {len(weights)}, got {batch_size}"
        )
    counts = [1] * len(weights)
    for _ in range(batch_size - len(weights)):
        lacking = [weight * batch_size - count for weight, count in zip(weights, counts, strict=True)]
        counts[lacking.index(max(lacking))] += 1
    return counts


class Loader:
    """Training batches of a dataset. ``steps_hint``, the length of the run, is only used to log the epochs ahead."""

    def __init__(self, dataset: Dataset, data_config: DataConfig, *, batch_size: int, steps_hint: int) -> None:
        if batch_size < 1:
            raise DataError(f"batch_size = {batch_size} must be at least 1")
        self.batch_size, self.sample = batch_size, 0
        self._length, self._packing = data_config.seq_len, data_config.packing
        eos, seed = dataset.tokenizer.eos, data_config.seed
        self._mixture = _Mixture(dataset.weights, seed)
        self._shuffled = [_source(d, self._length, seed, n, eos) for n, d in enumerate(dataset.train)]
        self._check_records(dataset)
        self._streams: list[tuple[_Streams, int]] = []  # of every stream, its source's streams and its place in them
        samples = steps_hint * batch_size
        if self._packing == "streams":
            counts = _share_streams(dataset.weights, batch_size)
            for number, (data, count) in enumerate(zip(dataset.train, counts, strict=True)):
                streams = _Streams(data, count, seed, number, eos)
                self._streams += [(streams, i) for i in range(count)]
            shares = [count / batch_size for count in counts]
        else:
            shares = dataset.weights
        for name, share, source in zip(dataset.names, shares, self._shuffled, strict=True):
            epochs = samples * share / source.per_epoch
            logger.info("%s: %.3g of the samples, %.3g epochs in %d steps", name, share, epochs, steps_hint)
        self._parts: dict[str, Any] = {
            **dataset.parts,
            "weights": dataset.weights,
            "seq_len": self._length,
            "packing": self._packing,
            "seed": seed,
        }
        if self._packing == "streams":
            self._parts["batch_size"] = batch_size  # the number of streams

    def _check_records(self, dataset: Dataset) -> None:
        """Say how records are packed and what does not fit; `ConfigError` where they cannot be trained on."""
        for name, source, data in zip(dataset.names, self._shuffled, dataset.train, strict=True):
            if not isinstance(source, _Records):
                continue
            if self._packing != "reset":
                raise ConfigError(
                    f"{name}: data.packing = {self._packing} would let instruction records read each other; set "
                    "data.packing: reset"
                )
            for records, what in (
                (source.cut, f"are longer than seq_len = {self._length} and lose the end of their answers"),
                (source.left_out, f"are left out, as their answers begin behind seq_len = {self._length}"),
            ):
                if len(records):
                    ids = ", ".join(data.doc_ids[i] for i in records[:5].tolist())
                    logger.info("%s: %d records %s (%s%s)", name, len(records), what, ids, " ..." * (len(records) > 5))
            if not len(source.records):
                raise DataError(f"{name}: all answers begin behind seq_len = {self._length}; raise data.seq_len")
            rows, fill = source.per_epoch, 100 * source.fill
            logger.info("%s: %d records in %d rows, %.1f %% filled", name, len(source.records), rows, fill)
        _held_out_rows(dataset, self._length)  # evaluation would find out only after many steps

    # -- any sample --------------------------------------------------------------------------------------------------

    def batch(self, step: int) -> Batch:
        """The batch of optimizer step ``step`` (from 0)."""
        return self.samples(step * self.batch_size, self.batch_size)

    def samples(self, start: int, count: int) -> Batch:
        """The ``count`` samples from global sample ``start`` on."""
        if start < 0 or count < 1:
            raise DataError(f"samples({start}, {count}): needs a start of at least 0 and a count of at least 1")
        return self._stream_samples(start, count) if self._packing == "streams" else self._mixed_samples(start, count)

    def _mixed_samples(self, start: int, count: int) -> Batch:
        rows = [(self._shuffled[source], local) for source, local in map(self._mixture, range(start, start + count))]
        ids = list(range(start, start + count))
        return _batch(rows, self._length, ids, packed=self._packing == "reset")

    def _stream_samples(self, start: int, count: int) -> Batch:
        if count > self.batch_size:
            raise DataError(
                f"samples({start}, {count}): with packing streams a batch holds each of the {self.batch_size} streams "
                "at most once, as a sequence continues the state of the batch before"
            )
        rows = np.empty((count, self._length + 1), dtype=np.int64)
        boundaries, fresh, places = [], [], []
        for row in range(count):
            step, stream = divmod(start + row, self.batch_size)
            streams, place = self._streams[stream]
            found = streams.read(place, step * self._length, rows[row])
            boundaries.append(found)
            fresh.append(bool(len(found)) and found[0] == 0)
            places.append(stream)
        tokens, targets = torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(rows[:, 1:].copy())
        cu_seqlens, firsts = _cu_seqlens(boundaries, self._length)
        carried, last = [-1] * (len(cu_seqlens) - 1), [-1] * self.batch_size
        for row, stream in enumerate(places):
            carried[firsts[row]] = -1 if fresh[row] else stream
            last[stream] = firsts[row + 1] - 1
        ids = list(range(start, start + count))
        return Batch(tokens.view(1, -1), targets.view(1, -1), cu_seqlens, carried, last, ids)

    # -- one after another -------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch; there is always one."""
        out = self.samples(self.sample, self.batch_size)
        self.sample += self.batch_size
        return out

    def state_dict(self) -> dict[str, Any]:
        return {"format_version": FORMAT_VERSION, "sample": self.sample, "fingerprint": dict(self._parts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken; data or packing that differ would repeat or skip text, so are refused."""
        if state.get("format_version") != FORMAT_VERSION:
            raise DataError(
                f"data state of format {state.get('format_version')!r}; this version reads {FORMAT_VERSION}"
            )
        then = state["fingerprint"]
        names = sorted(then.keys() | self._parts.keys())
        changed = [
            f"{n}: {_short(then.get(n))} -> {_short(self._parts.get(n))}"
            for n in names
            if then.get(n) != self._parts.get(n)
        ]
        if changed:
            raise DataError(
                f"the data differ from those the run was started with ({'; '.join(changed)}); "
                "restore them, or start a new run from the checkpoint's weights"
            )
        if self._packing == "streams" and state["sample"] % self.batch_size:
            raise DataError(f"sample {state['sample']} is not at the start of a step of {self.batch_size} streams")
        self.sample = int(state["sample"])


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:13]}..."


def _cu_seqlens(boundaries: list[np.ndarray], length: int) -> tuple[torch.Tensor, list[int]]:
    """Starts of the sequences in rows laid end to end, and the number of each row's first sequence (and the total)."""
    parts, firsts = [], [0]
    for row, found in enumerate(boundaries):
        inside = found[(found > 0) & (found < length)]
        parts.append(np.concatenate(([0], inside)) + row * length)
        firsts.append(firsts[-1] + len(inside) + 1)
    parts.append(np.array([len(boundaries) * length]))
    return torch.from_numpy(np.concatenate(parts).astype(np.int32)), firsts


def _batch(rows: list[tuple[_Source, int]], length: int, ids: list[int], *, packed: bool) -> Batch:
    """The given samples of sources; ``packed``: each document in them is a sequence of its own."""
    tokens, targets = np.empty((2, len(rows), length), dtype=np.int64)
    boundaries = [source.read(n, tokens[row], targets[row]) for row, (source, n) in enumerate(rows)]
    shape = (1, -1) if packed else (len(rows), length)
    cu_seqlens = _cu_seqlens(boundaries, length)[0] if packed else None
    return Batch(
        torch.from_numpy(tokens).view(shape), torch.from_numpy(targets).view(shape), cu_seqlens, None, None, ids
    )


def _source(data: TokenData, seq_len: int, seed: int, number: int, eos: int) -> _Source:
    return (_Shuffled if data.mask is None else _Records)(data, seq_len, seed, number, eos)


def _held_out_rows(dataset: Dataset, seq_len: int) -> list[tuple[_Source, int]]:
    """All samples of the held-out part."""
    eos = dataset.tokenizer.eos
    sources: list[_Source] = [
        _InOrder(data, seq_len, eos) if data.mask is None else _Records(data, seq_len, 0, number, eos)
        for number, data in enumerate(dataset.held_out)
    ]
    rows = [(source, n) for source in sources for n in range(source.per_epoch)]
    if not rows and any(data.documents for data in dataset.held_out):
        raise DataError(
            f"no held-out record's answer begins within seq_len = {seq_len}; raise data.seq_len or data.held_out, or "
            "hold nothing out (held_out: 0)"
        )
    return rows


def held_out_batches(
    dataset: Dataset, *, seq_len: int, batch_size: int, max_tokens: int
) -> Iterator[tuple[Batch, int]]:
    """The held-out documents in their stored order, each behind an eos; with each batch the bytes of its targets.

    If there are more than ``max_tokens``, evenly spaced windows are taken, the same every time. A source's last
    window may be shorter (its other targets do not count). An eos counts no bytes. Instruction records come packed in
    rows, in batches of their own; only what the assistant writes is a target.
    """
    rows = _held_out_rows(dataset, seq_len)
    if not rows:
        raise DataError("no held-out documents; set held_out above 0 (and have at least two documents)")
    wanted = max(1, max_tokens // seq_len)
    if wanted < len(rows):
        rows = [rows[(2 * i + 1) * len(rows) // (2 * wanted)] for i in range(wanted)]
    return _held_out(rows, seq_len, batch_size, dataset.tokenizer.token_bytes)


def _held_out(
    rows: list[tuple[_Source, int]], seq_len: int, batch_size: int, token_bytes: np.ndarray
) -> Iterator[tuple[Batch, int]]:
    for packed in (False, True):
        own = [row for row in rows if isinstance(row[0], _Records) == packed]
        for begin in range(0, len(own), batch_size):
            part = own[begin : begin + batch_size]
            batch = _batch(part, seq_len, list(range(begin, begin + len(part))), packed=packed)
            yield batch, int(token_bytes[batch.targets[batch.targets != IGNORED].numpy()].sum())
