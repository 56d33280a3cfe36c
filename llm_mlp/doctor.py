"""Does this machine compute what it should? Every way to read a text against every other, and against float64.

The contract: reading at once, in pieces, packed beside other texts, in a batch, and token by token in a pool with
padding rows give the same log-probabilities within the dtype's rounding; a restored context, a second run and a request
to the invariant engine in whatever company give the same to the bit. Of the engine's default mode the log-probabilities
are compared up to the first token that differs.

Beside the errors stands what is discrete: tokens whose most likely successor is another one, and memorised slots that
hold another token (`llm_mlp.models.choices`), in number and rate. Where two candidates lie within rounding they may
differ, which is no failure; but whoever relies on them should know how often.

The bound is measured, not guessed: a way's root mean square error against float64 is at most four times that of reading
at once (or eps of the dtype, where that is more), because no way may be worse in kind. A state that is kept in fewer
bits (`LM.keep_state`) adds an error of its own, whoever computes: the bound is then at least four times what steps in
float64 lose by keeping it so. Quantised weights are compared with what they stand for.
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import llm_mlp
from llm_mlp.context import Context, Reader
from llm_mlp.infer import Engine, Event, Request, Sampling, Start, state_bytes
from llm_mlp.models import LM
from llm_mlp.models.choices import Differing, Written
from llm_mlp.models.mixer import State
from llm_mlp.ops import backend, tune
from llm_mlp.weights import exact_copy

FACTOR, FLOOR = 4, 1  # of the error of reading at once; of eps
WORST = 4  # how many times the root mean square error the largest of some tens may be
WRITTEN = 32  # tokens that the engine writes


@dataclass(frozen=True)
class Check:
    """One way of reading, compared."""

    name: str
    error: float  # root mean square of the log-probabilities' error against float64 (bit-equality: largest difference)
    bound: float
    differing: int  # tokens whose most likely successor is another one (the engine: the first one that differs)
    tokens: int  # that were compared
    passed: bool
    note: str = ""
    choices: list[Differing] = field(default_factory=list)  # of the slots after the text, by layer and group

    @property
    def slots(self) -> int:
        """Memorised slots in use, of all layers and groups."""
        return sum(sum(layer.slots) for layer in self.choices)

    @property
    def differing_slots(self) -> int:
        """Those that hold another token."""
        return sum(sum(layer.differing) for layer in self.choices)


class Read(NamedTuple):
    """What a way of reading a text came to."""

    logits: Tensor  # [1, T, vocabulary]
    state: State  # of one sequence


def environment(device: torch.device) -> dict[str, str]:
    """What runs here."""
    found = {"llm_mlp": llm_mlp.__version__, "python": platform.python_version(), "torch": torch.__version__}
    try:
        found["triton"] = version("triton")
    except PackageNotFoundError:
        found["triton"] = "not installed"
    found["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {platform.machine()}"
    if device.type == "cuda":
        found["compute capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
        if found["triton"] != "not installed":
            found["assembler"] = tune.newest_assembler() or "Triton's own, or TRITON_PTXAS_PATH"
    else:
        found["threads"] = str(torch.get_num_threads())
    return found


def backends(run: Callable[[], Any]) -> list[dict[str, str]]:
    """Which implementation each op chooses while ``run`` runs, and why."""
    with backend.noticed() as found:
        run()
    return [{"op": op, "backend": kind, "why": why} for op, kind, _, why in sorted(found)]


@torch.no_grad()
def examine(model: LM, *, tokens: int = 600, seed: int = 0) -> tuple[list[Check], list[dict[str, str]]]:
    """The checks on a model as it is (its dtype, its device), and the backends it ran on.

    Args:
        tokens: of the text that is read; a few blocks of memorised units should fit in.
    """
    model = model.eval()
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=generator).to(device)
    other = torch.randint(model.config.vocab_size, (2, tokens), generator=generator).to(device)
    whole: list[Read] = []

    def look() -> None:
        whole.append(_at_once(model, ids))
        _steps(model, ids[:, :3])

    chosen = backends(look)
    truth = exact_copy(model)
    exact = Written(truth, ids)
    first = whole[0]
    eps = torch.finfo(dtype).eps
    base = _error(first.logits, exact.logits)
    kept = None if model.kept == "auto" else _steps(truth.keep_state(model.kept), ids)
    lost = 0.0 if kept is None else _error(kept.logits, exact.logits)
    bound = max(FACTOR * base, FACTOR * lost, FLOOR * eps)
    checks: list[Check] = []

    def add(name: str, error: float, bound: float, got: Read, like: Read, passed: bool, note: str = "") -> None:
        unlike = int((got.logits.argmax(-1) != like.logits.argmax(-1)).sum())
        choices = exact.compare(got.state, like.state)
        checks.append(Check(name, error, bound, unlike, got.logits.shape[1], passed, note, choices))

    def near(name: str, got: Read) -> None:
        error = _error(got.logits, exact.logits)
        add(name, error, bound, got, first, error <= bound)

    def equal(name: str, a: Read, b: Read) -> None:
        worst = float((a.logits.double() - b.logits.double()).abs().max())
        add(name, worst, 0.0, a, b, torch.equal(a.logits, b.logits), "to the bit")

    in_full = Read(exact.logits, exact.state)
    add("at once", base, bound, first, in_full, bool(torch.isfinite(first.logits).all()), "the yardstick")
    if kept is not None:
        add("float64, state kept", lost, bound, kept, in_full, True, f"what {model.kept} itself costs")
    if any(row["backend"] == "triton" for row in chosen):
        with backend.assuming("chunked"):
            near("in plain torch", _at_once(model, ids))
    near("in pieces", _pieces(model, ids, [1, tokens // 3, 7, tokens]))
    near("packed", _packed(model, ids, other))
    near("in a batch", _batch(model, ids, other))
    near("token by token", _steps(model, ids))
    near("in a pool, with padding", _pool(model, ids, other))
    equal("a second time", _at_once(model, ids), first)
    equal("restored from disk", *_restored(model, ids))
    try:
        state_bytes(model)
    except ValueError:  # attention: the engine does not serve it
        return checks, chosen
    checks.append(_company(model, truth, ids, other, invariant=True, bound=0.0))
    # A difference of two runs, each of which may be off by the bound, and the worst of all, where the bound is a mean.
    checks.append(_company(model, truth, ids, other, invariant=False, bound=2 * WORST * bound))
    return checks, chosen


def _error(got: Tensor, exact: Tensor) -> float:
    if not torch.isfinite(got).all():
        return float("inf")
    return float((got.double().log_softmax(-1) - exact.log_softmax(-1)).square().mean().sqrt())


def _at_once(model: LM, ids: Tensor) -> Read:
    out = model(ids)
    assert out.logits is not None
    return Read(out.logits, out.state)


def _of(state: State, row: int) -> State:
    """One sequence's, of a batch's or a pool's."""
    return {name: t[row : row + 1] for name, t in state.items()}


def _pieces(model: LM, ids: Tensor, cuts: list[int]) -> Read:
    state, found, done = None, [], 0
    for end in sorted(set(cuts)):
        out = model(ids[:, done:end], state)
        state, done = out.state, end
        found.append(out.logits)
    return Read(torch.cat(found, 1), state or {})


def _packed(model: LM, ids: Tensor, other: Tensor) -> Read:
    n = ids.shape[1]
    before, after = other[:1, : n // 2 + 1], other[1:, :5]
    bounds = torch.tensor([0, before.shape[1], before.shape[1] + n, before.shape[1] + n + 5])
    out = model(torch.cat([before, ids, after], 1), cu_seqlens=bounds)
    return Read(out.logits[:, before.shape[1] : before.shape[1] + n], _of(out.state, 1))


def _batch(model: LM, ids: Tensor, other: Tensor) -> Read:
    logits, state = _at_once(model, torch.cat([other[:1], ids, other[1:]]))
    return Read(logits[1:2], _of(state, 1))


def _steps(model: LM, ids: Tensor) -> Read:
    state = model.init_state(1)
    return Read(torch.stack([model.step(ids[:, t], state) for t in range(ids.shape[1])], 1), state)


def _pool(model: LM, ids: Tensor, other: Tensor) -> Read:
    """Row 2 of a pool of four, beside another text in row 0 and a padding row."""
    state = model.init_state(4)
    rows = torch.tensor([0, -1, 2], device=ids.device)
    found = []
    for t in range(ids.shape[1]):
        found.append(model.step(torch.cat([other[:1, t], other[1:, t], ids[:, t]]), state, rows)[2:])
    return Read(torch.stack(found, 1), _of(state, 2))


def _restored(model: LM, ids: Tensor) -> tuple[Read, Read]:
    """Ten steps after a context that was written and read again, and after the one that was not."""
    reader = Reader(model, None)
    made = reader.create(ids[0, :-10])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "context.safetensors"
        made.save(path)
        restored = reader.adopt(Context.load(path))
    found = []
    for context in (restored, made):
        state = {name: t.clone() for name, t in context.state.items()}
        logits = [context.logits, *(model.step(ids[:, t], state) for t in range(ids.shape[1] - 10, ids.shape[1]))]
        found.append(Read(torch.stack(logits, 1), state))
    return found[0], found[1]


def _answer(
    model: LM, ids: Tensor, other: Tensor, *, invariant: bool, company: bool
) -> tuple[list[tuple[int, float]], Start | None]:
    """A greedy answer of the engine: its tokens with their log probabilities, and where they end."""
    chunk = max(1, ids.shape[1] // 3)
    engine, found, ends = Engine(model, slots=4, chunk=chunk, invariant=invariant), list[tuple[int, float]](), []

    def take(event: Event) -> None:
        if event.token is not None:
            found.append((event.token, event.logprob))
        if event.final is not None:
            ends.append(event.final)

    requests = [Request(ids[0].tolist(), WRITTEN, Sampling(0), logprobs=0, keep=True)]
    if company:
        texts = (other[0], other[1, : chunk // 2 + 1], ids[0, :3])
        requests[:0] = [Request(text.tolist(), 7 * n, Sampling(0)) for n, text in enumerate(texts, 1)]
    for request in requests:
        engine.submit(request, take if request is requests[-1] else lambda event: None)
    while engine.busy:
        engine.step()
    return found, ends[0] if ends else None


def _company(model: LM, truth: LM, ids: Tensor, other: Tensor, *, invariant: bool, bound: float) -> Check:
    """A greedy answer of the engine alone and beside others that come and go: the log probabilities of its tokens and,
    where they are the same to the last, the slots behind them."""
    (alone, end), (beside, end_beside) = (
        _answer(model, ids, other, invariant=invariant, company=company) for company in (False, True)
    )
    pairs = list(zip(alone, beside, strict=False))
    same = next((n for n, ((a, _), (b, _)) in enumerate(pairs) if a != b), len(pairs))
    error = max((abs(a - b) for (_, a), (_, b) in pairs[:same]), default=float("inf"))
    whole = len(alone) == len(beside) == WRITTEN
    passed = whole and (alone == beside if invariant else error <= bound)
    note = "to the bit" if invariant else "" if same == WRITTEN else f"up to the first other token, after {same}"
    choices: list[Differing] = []
    if same == WRITTEN and end is not None and end_beside is not None:
        text = torch.as_tensor(end.tokens).long().to(ids.device)[None]
        choices = Written(truth, text).compare(end_beside.state, end.state)
    name = "engine, invariant" if invariant else "engine, default"
    compared = min(same + 1, WRITTEN)  # behind the first other token they are two texts
    return Check(name, error, bound, int(same < WRITTEN), compared, passed, note, choices)


def report(checks: list[Check], chosen: list[dict[str, str]], about: dict[str, str]) -> dict[str, Any]:
    """All of it as plain data."""
    return {
        "environment": about,
        "backends": chosen,
        "checks": [_plain(c) for c in checks],
        "passed": all(c.passed for c in checks),
    }


def _plain(check: Check) -> dict[str, Any]:
    counts = {"slots": check.slots, "differing_slots": check.differing_slots}
    rates = {"token_rate": _rate(check.differing, check.tokens), "slot_rate": _rate(check.differing_slots, check.slots)}
    return asdict(check) | counts | rates


def _rate(some: int, all_: int) -> float | None:
    return some / all_ if all_ else None


def table(checks: list[Check]) -> list[str]:
    """The checks as lines for a terminal; behind one whose slots differ, where they are."""
    lines = [f"{'reading':26}{'error':>10}{'bound':>10}{'other tokens':>22}{'other slots':>24}"]
    for c in checks:
        counts = f"{_counted(c.differing, c.tokens):>22}{_counted(c.differing_slots, c.slots):>24}"
        verdict = "ok" if c.passed else "FAILED"
        lines.append(f"{c.name:26}{c.error:>10.3g}{c.bound:>10.3g}{counts}  {verdict}  {c.note}".rstrip())
        some = [layer for layer in c.choices if any(layer.differing)]
        if some:
            where = "; ".join(f"layer {layer.layer}: {' '.join(map(str, layer.differing))}" for layer in some)
            lines.append(f"    other slots of each group, {where}")
    return lines


def _counted(some: int, all_: int) -> str:
    """A number of how many, and the rate where there are any."""
    return f"{some} of {all_:,}" + (f" ({some / all_:.2%})" if some else "")
