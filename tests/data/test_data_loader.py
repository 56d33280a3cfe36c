"""Batches: every token once, targets shifted, a pure function of the sample index, resumable."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch

from llm_mlp.config import DataConfig
from llm_mlp.data import Batch, DataError, Dataset, Loader, TokenData, Tokenizer, held_out_batches
from llm_mlp.data.loader import _share_streams, permutation

BYTES = Tokenizer.bytes()
EOS = BYTES.eos
T = 16


def data_of(documents: Iterable[Iterable[int]]) -> TokenData:
    parts = [np.array(list(document), dtype=np.uint16) for document in documents]
    offsets = np.cumsum([0, *map(len, parts)]).astype(np.int64)
    return TokenData(np.concatenate(parts), offsets, int(offsets[-1]))


def random_documents(count: int, seed: int, longest: int = 40, low: int = 0, high: int = 256) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(low, high, rng.integers(1, longest)).tolist() for _ in range(count)]


def dataset_of(train: list[TokenData], held_out: list[TokenData] | None = None, weights: Any = None) -> Dataset:
    weights = weights or [1 / len(train)] * len(train)
    names = [f"source{i}" for i in range(len(train))]
    return Dataset(BYTES, train, held_out or train, weights, names, {"sources": "s", "tokenizer": "t", "held_out": "h"})


def loader_of(dataset: Dataset, packing: str = "joined", batch_size: int = 4, **values: Any) -> Loader:
    config = DataConfig.model_validate({"seq_len": T, "packing": packing, **values})
    return Loader(dataset, config, batch_size=batch_size, steps_hint=10)


DOCUMENTS = random_documents(60, seed=1)
DATA = data_of(DOCUMENTS)
ONE = dataset_of([DATA])
PACKINGS = ["joined", "reset", "streams"]


def same(a: Batch, b: Batch) -> bool:
    return (
        torch.equal(a.tokens, b.tokens)
        and torch.equal(a.targets, b.targets)
        and (a.cu_seqlens is None) == (b.cu_seqlens is None)
        and (a.cu_seqlens is None or torch.equal(a.cu_seqlens, b.cu_seqlens))  # type: ignore[arg-type]
        and (a.carried, a.last, a.sample_ids) == (b.carried, b.last, b.sample_ids)
    )


def rows(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    return batch.tokens.view(-1, T).numpy(), batch.targets.view(-1, T).numpy()


def epoch_of(loader: Loader, epoch: int = 0) -> Batch:
    per_epoch = loader._shuffled[0].per_epoch
    return loader.samples(epoch * per_epoch, per_epoch)


@pytest.mark.parametrize("packing", ["joined", "reset"])
@pytest.mark.parametrize("epoch", [0, 3])
def test_every_token_is_predicted_once_an_epoch(packing: str, epoch: int) -> None:
    # Tokens with their predecessors are unique here, so a repeated or lost window shows.
    documents = [list(range(start, start + length)) for start, length in ((0, 50), (50, 1), (51, 100), (151, 105))]
    batch = epoch_of(loader_of(dataset_of([data_of(documents)]), packing), epoch)
    tokens, targets = rows(batch)
    counted = targets != -100
    assert Counter(targets[counted].tolist()) == Counter({**dict.fromkeys(range(256), 1), EOS: 4})
    follows = {(a, b) for a, b in zip(tokens[counted].tolist(), targets[counted].tolist(), strict=True) if b != EOS}
    expected = {(d[i - 1] if i else EOS, d[i]) for d in documents for i in range(len(d))}
    assert follows == expected
    assert {a for a, b in zip(tokens[counted].tolist(), targets[counted].tolist(), strict=True) if b == EOS} == {
        d[-1] for d in documents
    }


@pytest.mark.parametrize("seq_len", [8, 16, 1000])
def test_windows_are_the_naive_concatenation(seq_len: int) -> None:
    loader = loader_of(ONE, seq_len=seq_len, seed=5)
    order = permutation(len(DOCUMENTS), 5, 0, 0, 0)
    naive = [i for d in order for i in (EOS, *DOCUMENTS[d])] + [EOS]
    count = -(-(len(naive) - 1) // seq_len)
    assert loader._shuffled[0].per_epoch == count
    windows = permutation(count, 5, 0, 0, 1)
    batch = loader.samples(0, count)
    for row, w in enumerate(windows):
        expected = naive[w * seq_len : (w + 1) * seq_len + 1]
        missing = seq_len + 1 - len(expected)
        assert batch.tokens[row].tolist() == (expected + [EOS] * missing)[:-1]
        assert batch.targets[row].tolist() == expected[1:] + [-100] * missing


@pytest.mark.parametrize("packing", PACKINGS)
def test_targets_are_the_next_tokens(packing: str) -> None:
    for step in range(30):
        tokens, targets = rows(loader_of(ONE, packing).batch(step))
        assert tokens.dtype == targets.dtype == np.int64
        inside = targets[:, :-1] != -100
        assert (tokens[:, 1:] == targets[:, :-1])[inside].all() and inside.any()


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_batch_depends_on_its_index_alone(packing: str) -> None:
    one, other = loader_of(ONE, packing), loader_of(ONE, packing)
    forward = [one.batch(i) for i in range(60)]
    for i in (59, 3, 40, 0, 59):
        assert same(other.batch(i), forward[i])
    assert forward[7].sample_ids == [28, 29, 30, 31]
    different = loader_of(ONE, packing, seed=1)
    assert not same(different.batch(0), forward[0])


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("sources", [1, 3])
def test_resumed_is_uninterrupted(packing: str, sources: int) -> None:
    dataset = dataset_of([data_of(random_documents(20, seed=i)) for i in range(sources)])
    straight = loader_of(dataset, packing)
    batches = [next(straight) for _ in range(40)]
    interrupted = loader_of(dataset, packing)
    for _ in range(13):
        next(interrupted)
    state = interrupted.state_dict()
    assert state["sample"] == 52 and state["format_version"] == 1
    resumed = loader_of(dataset, packing)
    resumed.load_state_dict(state)
    assert all(same(next(resumed), batch) for batch in batches[13:])


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"seq_len": 32}, "seq_len: 16 -> 32"),
        ({"packing": "reset"}, "packing: 'joined' -> 'reset'"),
    ],
)
def test_state_of_other_settings_is_refused(values: dict[str, Any], says: str) -> None:
    state = loader_of(ONE).state_dict()
    with pytest.raises(DataError, match=says):
        loader_of(ONE, **values).load_state_dict(state)


def test_state_of_other_data_is_refused() -> None:
    state = loader_of(ONE).state_dict()
    changed = Dataset(BYTES, [DATA], [DATA], [1.0], ["a"], {**ONE.parts, "sources": "other"})
    with pytest.raises(DataError, match="sources: 's' -> 'other'"):
        loader_of(changed).load_state_dict(state)
    with pytest.raises(DataError, match="format 9"):
        loader_of(ONE).load_state_dict({**state, "format_version": 9})
    loader_of(ONE, batch_size=8).load_state_dict(state)  # samples do not depend on the batch size
    with pytest.raises(DataError, match="batch_size: 4 -> 8"):  # but the number of streams does
        loader_of(ONE, "streams", 8).load_state_dict(loader_of(ONE, "streams", 4).state_dict())


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("sources", [1, 2])
def test_a_range_is_its_parts(packing: str, sources: int) -> None:
    dataset = dataset_of([data_of(random_documents(30, seed=i)) for i in range(sources)])
    loader = loader_of(dataset, packing, batch_size=12)
    for start in (0, 36, 30, 600):
        whole, parts = (
            loader.samples(start, 12),
            [loader_of(dataset, packing, 12).samples(start + i, 3) for i in (0, 3, 6, 9)],
        )
        for name in ("tokens", "targets"):
            joined = torch.cat([getattr(p, name).view(-1, T) for p in parts])
            assert torch.equal(getattr(whole, name).view(-1, T), joined)
        assert whole.sample_ids == [i for p in parts for i in p.sample_ids]
        if packing != "joined":
            shifted = [p.cu_seqlens[:-1] + 3 * T * i for i, p in enumerate(parts)]  # type: ignore[index]
            assert whole.cu_seqlens is not None
            assert whole.cu_seqlens[:-1].tolist() == torch.cat(shifted).tolist()
        if packing == "streams":
            assert whole.carried == [i for p in parts for i in p.carried or ()]


def test_epochs_differ_and_hold_the_same_text() -> None:
    loader = loader_of(ONE)
    epochs = [rows(epoch_of(loader, e))[1] for e in range(3)]
    assert not (epochs[0] == epochs[1]).all() and not (epochs[1] == epochs[2]).all()
    assert len({tuple(np.sort(e, axis=None)) for e in epochs}) == 1
    first = {tuple(row) for row in epochs[0]}
    assert sum(tuple(row) in first for row in epochs[1]) < len(first) / 2, "documents are in another order too"


def test_batches_reach_over_the_end_of_an_epoch() -> None:
    loader = loader_of(ONE)
    n = loader._shuffled[0].per_epoch
    both = rows(loader.samples(n - 2, 4))[0]
    assert (both == np.concatenate([rows(epoch_of(loader, 0))[0][-2:], rows(epoch_of(loader, 1))[0][:2]])).all()


def test_less_text_than_a_window() -> None:
    loader = loader_of(dataset_of([data_of([[1, 2, 3]])]))
    batch = loader.samples(0, 2)
    assert batch.tokens[0].tolist() == [EOS, 1, 2, 3] + [EOS] * 12
    assert batch.targets[0].tolist() == [1, 2, 3, EOS] + [-100] * 12
    assert torch.equal(batch.tokens[0], batch.tokens[1])


def test_reset_starts_a_sequence_at_rows_and_documents() -> None:
    loader, joined = loader_of(ONE, "reset"), loader_of(ONE)
    for step in range(20):
        batch = loader.batch(step)
        assert torch.equal(batch.tokens.view(-1, T), joined.batch(step).tokens)
        assert torch.equal(batch.targets.view(-1, T), joined.batch(step).targets)
        assert batch.tokens.shape == (1, 4 * T) and batch.carried is None and batch.last is None
        assert batch.cu_seqlens is not None and batch.cu_seqlens.dtype == torch.int32
        flat = batch.tokens[0].tolist()
        # Padding is eos too: only its first starts a sequence.
        pad = (batch.targets[0] == -100).tolist()
        starts = {i for i in range(4 * T) if i % T == 0 or (flat[i] == EOS and not (pad[i] and pad[i - 1]))}
        assert batch.cu_seqlens.tolist() == [*sorted(starts), 4 * T]


def test_permutation_is_fixed_for_ever() -> None:
    assert permutation(8, 0, 1, 2).tolist() == PERMUTATION
    assert sorted(permutation(1000, -1, 0)) == list(range(1000))


PERMUTATION = [6, 7, 2, 3, 0, 5, 1, 4]


# -- streams ---------------------------------------------------------------------------------------------------------


def stream_text(loader: Loader, stream: int, steps: int) -> list[int]:
    return [i for s in range(steps) for i in loader.batch(s).tokens.view(-1, T)[stream].tolist()]


def test_streams_continue_where_they_stopped() -> None:
    loader = loader_of(ONE, "streams")
    last = rows(loader.batch(0))[1][:, -1]
    for step in range(1, 80):
        tokens, targets = rows(loader.batch(step))
        assert (tokens[:, 0] == last).all()
        last = targets[:, -1]


def test_streams_read_whole_documents_and_stay_balanced() -> None:
    loader = loader_of(ONE, "streams")
    total = len(DATA.tokens) + len(DOCUMENTS)
    steps = total // (4 * T) * 3
    texts = [stream_text(loader, b, steps) for b in range(4)]
    found: Counter[tuple[int, ...]] = Counter()
    known = Counter(map(tuple, DOCUMENTS))
    for text in texts:
        assert text[0] == EOS
        documents: list[tuple[int, ...]] = []
        current: list[int] = []
        for i in text[1:]:
            if i == EOS:
                documents.append(tuple(current))
                current = []
            else:
                current.append(i)
        assert all(d in known for d in documents)
        found.update(documents)
    # Three epochs' worth of text: every document was read two to four times, not only those of some streams.
    assert all(2 * known[d] <= found[d] <= 4 * known[d] for d in known)


def test_carried_and_last() -> None:
    loader = loader_of(ONE, "streams")
    carries = 0
    for step in range(60):
        batch = loader.batch(step)
        assert batch.cu_seqlens is not None and batch.carried is not None and batch.last is not None
        cu = batch.cu_seqlens.tolist()
        assert len(batch.carried) == len(cu) - 1 and len(batch.last) == 4
        flat = batch.tokens[0].tolist()
        assert cu == [*(i for i in range(4 * T) if i % T == 0 or flat[i] == EOS), 4 * T]
        for n, start in enumerate(cu[:-1]):
            row_start = start % T == 0
            continues = row_start and flat[start] != EOS
            assert batch.carried[n] == (start // T if continues else -1)
            carries += continues
        assert batch.last == [cu.index((b + 1) * T) - 1 for b in range(4)]
    assert carries > 100
    assert loader.batch(0).carried[0] == -1  # type: ignore[index]
    part = loader.samples(4 * 7 + 1, 2)
    assert part.last is not None and [x >= 0 for x in part.last] == [False, True, True, False]
    assert part.carried is not None and set(part.carried) <= {-1, 1, 2}


def test_more_streams_than_documents() -> None:
    loader = loader_of(dataset_of([data_of([list(range(100))])]), "streams")
    for stream in range(4):
        assert stream_text(loader, stream, 14)[:202] == [EOS, *range(100)] * 2


def test_a_batch_holds_a_stream_once() -> None:
    with pytest.raises(DataError, match="each of the 4 streams at most once"):
        loader_of(ONE, "streams").samples(0, 5)


# -- several sources ------------------------------------------------------------------------------------------------


WEIGHTS = [0.6, 0.3, 0.1]
THREE = dataset_of([data_of(random_documents(40, i, low=80 * i, high=80 * i + 80)) for i in range(3)], weights=WEIGHTS)


def sources_of(batch: Batch) -> np.ndarray:
    tokens = batch.tokens.view(-1, T).numpy()
    return np.where(tokens == EOS, -1, tokens // 80).max(axis=1)


@pytest.mark.parametrize("count", [100, 10_000])
def test_shares_are_the_weights(count: int) -> None:
    found = sources_of(loader_of(THREE).samples(0, count))
    shares = np.bincount(found, minlength=3) / count
    assert np.abs(shares - WEIGHTS).max() < 5 / count


def test_each_source_keeps_its_own_epochs() -> None:
    loader = loader_of(THREE)
    batch = loader.samples(0, 3000)
    found = sources_of(batch)
    for number, data in enumerate(THREE.train):
        alone = loader._shuffled[number].per_epoch
        mine = batch.targets.numpy()[found == number][:alone]
        assert len(mine) == alone
        assert Counter(mine[(mine != -100) & (mine != EOS)].tolist()) == Counter(data.tokens.tolist())


def test_mixture_far_ahead_needs_no_replay() -> None:
    loader = loader_of(THREE)
    start = 3 * 2**16 - 2
    far, other = loader.samples(start, 4), loader_of(THREE)
    other.samples(0, 4)
    assert same(other.samples(start, 4), far)
    counts = Counter(loader._mixture(i)[0] for i in range(start))
    source, local = loader._mixture(start)
    assert local == counts[source]


def test_streams_belong_to_one_source() -> None:
    loader = loader_of(THREE, "streams", batch_size=10)
    owners = np.stack([sources_of(loader.batch(s)) for s in range(40)])
    assert (owners == owners[0]).all()
    assert np.bincount(owners[0]).tolist() == [6, 3, 1]
    assert _share_streams([0.98, 0.01, 0.01], 4) == [2, 1, 1]
    with pytest.raises(DataError, match="3 sources need a batch_size of at least 3, got 2"):
        loader_of(THREE, "streams", batch_size=2)


# -- held out --------------------------------------------------------------------------------------------------------


def test_held_out_documents_in_order_with_their_bytes() -> None:
    texts = ["one é", "two 😀!" * 9, "x"], ["second source " * 5]
    held_out = [data_of(BYTES.encode(text) for text in part) for part in texts]
    dataset = dataset_of([DATA, DATA], held_out)
    found = list(held_out_batches(dataset, seq_len=T, batch_size=3, max_tokens=10**6))
    assert sum(size for _, size in found) == sum(len(t.encode()) for part in texts for t in part)
    targets = [i for batch, _ in found for i in batch.targets.flatten().tolist() if i != -100]
    assert targets == [i for part in texts for t in part for i in (*t.encode(), EOS)]
    assert [batch.tokens.shape[0] for batch, _ in found[:-1]] == [3] * (len(found) - 1)
    for batch, size in found:
        counted = batch.targets[(batch.targets != -100) & (batch.targets != EOS)]
        assert size == len(counted)


def test_held_out_budget_is_spread_over_the_text() -> None:
    documents = [[i] * (T - 1) for i in range(200)]
    dataset = dataset_of([DATA], [data_of(documents)])

    def read(max_tokens: int) -> list[int]:
        batches = held_out_batches(dataset, seq_len=T, batch_size=4, max_tokens=max_tokens)
        return [row[1] for batch, _ in batches for row in batch.tokens.tolist()]

    assert read(10 * T) == [10, 30, 50, 70, 90, 110, 130, 150, 170, 190]
    assert read(10 * T) == read(10 * T + T - 1)
    assert read(200 * T) == list(range(200))
    assert len(read(1)) == 1


def test_no_held_out_documents() -> None:
    empty = TokenData(np.empty(0, np.uint16), np.zeros(1, np.int64), 0)
    with pytest.raises(DataError, match="no held-out documents; set held_out"):
        held_out_batches(dataset_of([DATA], [empty]), seq_len=T, batch_size=1, max_tokens=1)


def test_held_out_documents_never_appear_in_training(tmp_path: Any) -> None:
    from llm_mlp.config import SourceConfig
    from llm_mlp.data import prepare

    path = tmp_path / "a"
    path.mkdir()
    for i in range(256):
        (path / f"{i}.txt").write_text(f"<{i:03d}>" * 7)
    config = DataConfig(
        sources=(SourceConfig(path=str(path)),),
        tokenizer="byte",
        held_out=0.2,
        seq_len=T,
        cache_dir=str(tmp_path / "c"),
    )
    dataset = prepare(config, progress=False)
    hidden = {dataset.tokenizer.decode(dataset.held_out[0].document(i)) for i in range(dataset.held_out[0].documents)}
    assert len(hidden) > 20
    for packing in PACKINGS:
        loader = Loader(dataset, config.model_copy(update={"packing": packing}), batch_size=1, steps_hint=1)
        if packing == "streams":
            seen = stream_text(loader, 0, 3 * 256 * 36 // T)
        else:
            seen = rows(epoch_of(loader))[0].flatten().tolist()
        pieces = "".join(chr(i) if i < 256 else " " for i in seen)
        assert not any(text[:15] in pieces for text in hidden)
        shown = sum(f"<{i:03d}>" * 2 in pieces for i in range(256))
        assert shown >= 256 - len(hidden) - 10, "the others do appear"


def test_a_batch_takes_milliseconds() -> None:
    import time

    dataset = dataset_of([data_of(random_documents(20_000, 3, longest=400))])
    for packing in PACKINGS:
        loader = loader_of(dataset, packing, 64, seq_len=1024)
        loader.batch(0)
        times = []
        for step in range(1, 6):
            begin = time.perf_counter()
            loader.batch(step)
            times.append(time.perf_counter() - begin)
        assert min(times) < 0.05, packing
