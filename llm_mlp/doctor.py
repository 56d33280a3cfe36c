"""Does this machine compute what it should? Every way to read a text against every other, and against float64.

The contract: reading at once, in pieces, packed beside other texts, in a batch, and token by token in a pool with
padding rows give the same log-probabilities within the dtype's rounding; a restored context, a second run and a request
to the invariant engine in whatever company give the same to the bit. Of the engine's default mode the log-probabilities
are compared up to the first token that differs.

The bound is measured, not guessed: a way's root mean square error against float64 is at most four times that of reading
at once (or eps of the dtype, where that is more), because no way may be worse in kind. A state that is kept in fewer
bits (`LM.keep_state`) adds an error of its own, whoever computes: the bound is then at least four times what steps in
float64 lose by keeping it so. Quantised weights are compared with what they stand for.
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import llm_mlp
from llm_mlp.context import Context, Reader
from llm_mlp.infer import Engine, Event, Request, Sampling, state_bytes
from llm_mlp.models import LM
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
    differing: int  # tokens whose most likely successor is another one than reading at once says
    tokens: int
    passed: bool
    note: str = ""


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
    whole: list[Tensor] = []
    chosen = backends(lambda: whole.append(_logits(model, ids)) or _steps(model, ids[:, :3]))  # type: ignore[func-returns-value]
    truth = exact_copy(model)
    exact = _logits(truth, ids)
    first = whole[0]
    eps = torch.finfo(dtype).eps
    base = _error(first, exact)
    lost = 0.0 if model.kept == "auto" else _error(_steps(truth.keep_state(model.kept), ids), exact)
    bound = max(FACTOR * base, FACTOR * lost, FLOOR * eps)
    checks = [Check("at once", base, bound, 0, tokens, bool(torch.isfinite(first).all()), "the yardstick")]
    if model.kept != "auto":
        checks.append(Check("float64, state kept", lost, bound, 0, tokens, True, f"what {model.kept} itself costs"))

    def near(name: str, run: Callable[[], Tensor]) -> None:
        got = run()
        error = _error(got, exact)
        unlike = int((got.argmax(-1) != first.argmax(-1)).sum())
        checks.append(Check(name, error, bound, unlike, tokens, error <= bound))

    def equal(name: str, a: Tensor, b: Tensor, note: str) -> None:
        worst = float((a.double() - b.double()).abs().max())
        unlike = int((a.argmax(-1) != b.argmax(-1)).sum())
        checks.append(Check(name, worst, 0.0, unlike, a.shape[1], torch.equal(a, b), note))

    near("in pieces", lambda: _pieces(model, ids, [1, tokens // 3, 7, tokens]))
    near("packed", lambda: _packed(model, ids, other))
    near("in a batch", lambda: _logits(model, torch.cat([other[:1], ids, other[1:]]))[1:2])
    near("token by token", lambda: _steps(model, ids))
    near("in a pool, with padding", lambda: _pool(model, ids, other))
    equal("a second time", _logits(model, ids), first, "to the bit")
    equal("restored from disk", *_restored(model, ids), "to the bit")
    try:
        state_bytes(model)
    except ValueError:  # attention: the engine does not serve it
        return checks, chosen
    checks.append(_company(model, ids, other, invariant=True, bound=0.0))
    # A difference of two runs, each of which may be off by the bound, and the worst of all, where the bound is a mean.
    checks.append(_company(model, ids, other, invariant=False, bound=2 * WORST * bound))
    return checks, chosen


def _error(got: Tensor, exact: Tensor) -> float:
    if not torch.isfinite(got).all():
        return float("inf")
    return float((got.double().log_softmax(-1) - exact.log_softmax(-1)).square().mean().sqrt())


def _logits(model: LM, ids: Tensor) -> Tensor:
    found = model(ids).logits
    assert found is not None
    return found


def _pieces(model: LM, ids: Tensor, cuts: list[int]) -> Tensor:
    state, found, done = None, [], 0
    for end in sorted(set(cuts)):
        out = model(ids[:, done:end], state)
        state, done = out.state, end
        found.append(out.logits)
    return torch.cat(found, 1)


def _packed(model: LM, ids: Tensor, other: Tensor) -> Tensor:
    n = ids.shape[1]
    before, after = other[:1, : n // 2 + 1], other[1:, :5]
    bounds = torch.tensor([0, before.shape[1], before.shape[1] + n, before.shape[1] + n + 5])
    out = model(torch.cat([before, ids, after], 1), cu_seqlens=bounds)
    return out.logits[:, before.shape[1] : before.shape[1] + n]


def _steps(model: LM, ids: Tensor) -> Tensor:
    state = model.init_state(1)
    return torch.stack([model.step(ids[:, t], state) for t in range(ids.shape[1])], 1)


def _pool(model: LM, ids: Tensor, other: Tensor) -> Tensor:
    """Row 2 of a pool of four, beside another text in row 0 and a padding row."""
    state = model.init_state(4)
    rows = torch.tensor([0, -1, 2], device=ids.device)
    found = []
    for t in range(ids.shape[1]):
        found.append(model.step(torch.cat([other[:1, t], other[1:, t], ids[:, t]]), state, rows)[2:])
    return torch.stack(found, 1)


def _restored(model: LM, ids: Tensor) -> tuple[Tensor, Tensor]:
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
        found.append(torch.stack(logits, 1))
    return found[0], found[1]


def _company(model: LM, ids: Tensor, other: Tensor, *, invariant: bool, bound: float) -> Check:
    """A greedy answer of the engine alone and beside others that come and go; the log probabilities of its tokens."""
    chunk = max(1, ids.shape[1] // 3)

    def answer(company: bool) -> list[tuple[int, float]]:
        engine, found = Engine(model, slots=4, chunk=chunk, invariant=invariant), list[tuple[int, float]]()

        def take(event: Event) -> None:
            if event.token is not None:
                found.append((event.token, event.logprob))

        requests = [Request(ids[0].tolist(), WRITTEN, Sampling(0), logprobs=0)]
        if company:
            texts = (other[0], other[1, : chunk // 2 + 1], ids[0, :3])
            requests[:0] = [Request(text.tolist(), 7 * n, Sampling(0)) for n, text in enumerate(texts, 1)]
        for request in requests:
            engine.submit(request, take if request is requests[-1] else lambda event: None)
        while engine.busy:
            engine.step()
        return found

    alone, beside = answer(False), answer(True)
    pairs = list(zip(alone, beside, strict=False))
    same = next((n for n, ((a, _), (b, _)) in enumerate(pairs) if a != b), len(pairs))
    error = max((abs(a - b) for (_, a), (_, b) in pairs[:same]), default=float("inf"))
    whole = len(alone) == len(beside) == WRITTEN
    passed = whole and (alone == beside if invariant else error <= bound)
    note = "to the bit" if invariant else "" if same == WRITTEN else f"up to the first other token, after {same}"
    name = "engine, invariant" if invariant else "engine, default"
    return Check(name, error, bound, int(same < WRITTEN), WRITTEN, passed, note)


def report(checks: list[Check], chosen: list[dict[str, str]], about: dict[str, str]) -> dict[str, Any]:
    """All of it as plain data."""
    return {
        "environment": about,
        "backends": chosen,
        "checks": [asdict(c) for c in checks],
        "passed": all(c.passed for c in checks),
    }
