"""Which launch of the kernels a device gets right: checked against float64 before ``auto`` may choose it.

Compilers miscompile some kernels of this family on some GPUs (Triton 3.4 to 3.7 on Hopper: flash-linear-attention
issues 640, 984 and 1262; the last traces it to the assembler that Triton brings for Hopper, ptxas 12.8, and finds 13.1
right), silently or by an illegal access. So the newest assembler at hand is tried first, and the kernels are
checked once for each device, compiler
and set of sizes, forward and backward, beside `chunked` in the same dtype. The check runs in a process of its own,
because a miscompiled kernel can take the process's device with it, and what it found is kept in a file: in
``$LLM_MLP_CACHE``, else ``$XDG_CACHE_HOME/llm_mlp``, else ``~/.cache/llm_mlp``.

A tensor passes whose root mean square error is at most twice that of `chunked`, or 2 eps of its dtype times the truth's
root mean square, and whose largest error is at most three times as large as allowed on that count; four times where
it has under 1,000 numbers, whose error is chance. The truth is `chunked` in float64 on the rounded inputs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

log = logging.getLogger("llm_mlp.ops")

Sizes = tuple[tuple[str, int | str], ...]  # constants of a kernel, by name; dtype by its name
Table = dict[str, dict[str, Any]]  # how each kernel of an op is launched
TIMEOUT = 600  # seconds a check may take


class Plan(NamedTuple):
    """One way to run an op's kernels: which of its launch tables (``kernels.candidates``), and the assembler that
    compiles them (the path of a ptxas; empty: Triton's own)."""

    table: int = 0
    assembler: str = ""

    def of(self, tables: Sequence[Table]) -> Table:
        """The launch table. The option changes nothing but the key that Triton keeps binaries under."""
        table = tables[self.table]
        if self.assembler:
            table = {kernel: {**launch, "ptx_options": "-O3"} for kernel, launch in table.items()}
        return table

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Kernels first launched in the ``with`` block are compiled by the plan's assembler."""
        before = os.environ.get(ASSEMBLER)
        if self.assembler:
            os.environ[ASSEMBLER] = self.assembler
        try:
            yield
        finally:
            if self.assembler:
                os.environ.pop(ASSEMBLER)
                if before is not None:
                    os.environ[ASSEMBLER] = before


ASSEMBLER = "TRITON_PTXAS_PATH"  # as Triton reads it
SYSTEM_ASSEMBLER = "/usr/local/cuda/bin/ptxas"
_known: dict[tuple[str, Sizes], tuple[Plan | None, str]] = {}  # the plan that passed, or why none did


def plan(op: str, sizes: Sizes) -> Plan:
    """How an op's kernels run: the plan that passed, else the first."""
    return _known.get((op, sizes), (None, ""))[0] or Plan()


def aligned(x: Tensor) -> Tensor:
    """``x`` contiguous and, as Triton's wide loads want it, at a multiple of 16 bytes."""
    x = x.contiguous()
    if torch.compiler.is_compiling() or x.data_ptr() % 16 == 0:
        return x
    return x.clone()


def plans() -> list[Plan]:
    """All plans, the fastest and likeliest first."""
    newest = newest_assembler()
    return [Plan(table, path) for table in range(2) for path in dict.fromkeys((newest, ""))]


@lru_cache(maxsize=1)
def newest_assembler() -> str:
    """The path of the newest ptxas here, if it is newer than the one that Triton would take; else empty."""
    if os.environ.get(ASSEMBLER):
        return ""  # the user has chosen
    own = Path(find_spec("triton").origin or "").parent / "backends" / "nvidia" / "bin"  # type: ignore[union-attr]
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    found = [str(own / "ptxas-blackwell"), *(str(Path(home) / "bin" / "ptxas") for home in homes)]
    found += [path for path in (shutil.which("ptxas"), SYSTEM_ASSEMBLER) if path]
    best, best_version = "", _version(str(own / "ptxas"))
    for path in found:
        if (number := _version(path)) > best_version:
            best, best_version = path, number
    return best


def _version(path: str) -> tuple[int, ...]:
    """Of a ptxas; empty if there is none."""
    try:
        text = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    number = re.search(r"V(\d+)\.(\d+)\.(\d+)", text)
    return tuple(map(int, number.groups())) if number else ()


@torch.compiler.assume_constant_result
def untrusted(op: str, sizes: Sizes, device: str) -> str | None:
    """Why an op's kernels may not be chosen at these sizes; None if they passed. The first call may take a minute."""
    found = _known.get((op, sizes))
    if found is None:
        found = _known[op, sizes] = _look_up(op, sizes, device)
    return found[1] if found[0] is None else None


def _look_up(op: str, sizes: Sizes, device: str) -> tuple[Plan | None, str]:
    file, key = _cache_file(), _key(op, sizes, device)
    kept = _read(file)
    if key not in kept:
        what = ", ".join(f"{name} = {size}" for name, size in sizes)
        log.info("%s: checking the kernels for %s against float64 (once for this device, under a minute)", op, what)
        found: list[str] = []
        passed = None
        for way in plans():
            failures = check_apart(op, sizes, way, device)
            if not failures:
                passed = way
                break
            found.append(f"{way}: {'; '.join(failures)}")
        kept[key] = {"plan": passed, "failures": found}
        if passed is None:
            log.warning("%s: the kernels are wrong here for %s and will not be used: %s", op, what, " | ".join(found))
        _write(file, {**_read(file), key: kept[key]})
    row = kept[key]
    if row["plan"] is not None:
        return Plan(*row["plan"]), ""
    return None, f"the kernels failed their check on this device: {' | '.join(row['failures'])[:300]}"


def _key(op: str, sizes: Sizes, device: str) -> str:
    """Everything a check's outcome depends on."""
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        code.update(path.read_bytes())
    try:
        compiler = version("triton")
    except PackageNotFoundError:
        compiler = "?"
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    facts = [
        op,
        *(f"{n}={s}" for n, s in sizes),
        name,
        torch.__version__,
        compiler,
        newest_assembler(),
        code.hexdigest(),
    ]
    return " ".join(facts)


def _cache_file() -> Path:
    home = os.environ.get("LLM_MLP_CACHE")
    if home:
        return Path(home) / "kernels.json"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llm_mlp" / "kernels.json"


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf8"))
        return found if isinstance(found, dict) else {}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read and is made anew: %s", file, error)
        return {}


def _write(file: Path, rows: dict[str, Any]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="utf8") as out:
            json.dump(rows, out, indent=1)
        os.replace(out.name, file)
    except OSError as error:
        log.warning("%s cannot be written, the kernels will be checked again next time: %s", file, error)


# -- the check -----------------------------------------------------------------------------------------------------


def check_apart(op: str, sizes: Sizes, way: Plan, device: str) -> list[str]:
    """`check` of a plan in a process of its own: what fails."""
    spec = json.dumps({"op": op, "sizes": sizes, "plan": way, "device": device})
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"from {__name__} import main; main()", spec],
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return [f"the check took over {TIMEOUT} s"]
    except OSError as error:
        return [f"the check did not start: {error}"]
    lines = [line for line in done.stdout.splitlines() if line.startswith("[")]
    if not lines:
        return [f"the check ended with {done.returncode}: {done.stderr.strip()[-200:]}"]
    found: list[str] = json.loads(lines[-1])
    return found


def compare(
    names: Sequence[str],
    got: Sequence[Tensor],
    yard: Sequence[Tensor],
    truth: Sequence[Tensor],
    largest: float = 3,
) -> list[str]:
    """What the rule above says of the tensors; ``largest``: how far it lets the largest error go."""
    failures = []
    for name, g, y, t in zip(names, got, yard, truth, strict=True):
        if not g.isfinite().all():
            failures.append(f"{name}: not finite")
            continue
        if not t.numel():
            continue
        mine, other = g.double() - t, y.double() - t
        few = 4 if t.numel() < 1000 else 1
        floor = 2 * torch.finfo(g.dtype).eps * float(t.square().mean().sqrt())
        for what, a, b, slack in (
            ("rms", mine.square().mean().sqrt(), other.square().mean().sqrt(), 1),
            ("largest", mine.abs().max(), other.abs().max(), largest),
        ):
            if not float(a) <= few * slack * max(2 * float(b), floor):
                failures.append(f"{name}: {what} error {float(a):.3g}, of chunked {float(b):.3g}")
    return failures


def both_ways(run: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Outputs, and gradients of a fixed random projection of them."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    outputs = [o for o in run(*leaves) if o.is_floating_point()]
    generator = torch.Generator().manual_seed(0)
    loss = sum(
        (o.double() * torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.device)).sum()
        for o in outputs
    )
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)  # type: ignore[arg-type]
    return [o.detach() for o in outputs] + [g for g in grads if g is not None]


def _perceive_cases(
    F: int, m: int, V: int, scalar: bool, dtype: torch.dtype, device: str
) -> list[tuple[Callable, list[Tensor]]]:
    from llm_mlp.ops.perceive import kernels, perceive

    B, T, G = 2, 200, 2
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    q, k = (torch.nn.functional.normalize(normal(B, T, G, F), dim=-1).to(dtype) for _ in range(2))
    beta = 1.9 * torch.rand((B, T, G), generator=generator)
    e = beta if scalar else (k.float() * beta[..., None]).to(dtype)
    w, state = normal(B, T, G, m, V).to(dtype), normal(B, G, F, m, V)
    mild = -torch.rand((B, T, G, m), generator=generator) / 8
    wild = torch.where(torch.rand((B, T, G, m), generator=generator) < 0.02, -torch.inf, mild * 40)
    wild[0] = mild[0]

    def run(backend: str, spans: bool) -> Callable:
        def call(*x: Tensor) -> Sequence[Tensor]:
            before = kernels.SPAN, kernels.FULL
            if spans:
                kernels.SPAN, kernels.FULL = 64, 10**6
            try:
                return perceive(*x, return_residual=True, backend=backend)
            finally:
                kernels.SPAN, kernels.FULL = before

        return call

    def inputs(decay: Tensor) -> list[Tensor]:
        return [x.to(device) for x in (q, k, e, w, decay, state)]

    return [
        (lambda backend: run(backend, False), inputs(mild)),  # type: ignore[list-item]
        (lambda backend: run(backend, False), inputs(wild)),  # type: ignore[list-item]
        (lambda backend: run(backend, True), inputs(wild)),  # type: ignore[list-item]
    ]


def _memorise_cases(
    R: int, width: int, activation: str, dtype: torch.dtype, device: str
) -> list[tuple[Callable, list[Tensor]]]:
    from llm_mlp.ops.memorise import memorise

    B, T, G = 2, 300, 2
    size: dict[str, Any] = {"block": 128, "slots": 32, "activation": activation}
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    q, k, w = normal(B, T, G, R), normal(B, T, G, R), normal(B, T, G, 1, width)
    score = torch.rand((B, T, G), generator=generator).to(device)
    sink = torch.zeros(G, device=device)

    def run(backend: str, carried: bool) -> Callable:
        def call(q: Tensor, k: Tensor, w: Tensor, sink: Tensor) -> Sequence[Tensor]:
            own = score.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
            if not carried:
                y, units = memorise(q, k, w, own, sink, **size, backend=backend)
                return y, units.keys, units.values
            first, units = memorise(q[:, :200], k[:, :200], w[:, :200], own[:, :200], sink, **size, backend=backend)
            y, units = memorise(
                q[:, 200:], k[:, 200:], w[:, 200:], own[:, 200:], sink, units, **size, backend=backend
            )  # fmt: skip
            return first, y, units.keys, units.values

        return call

    inputs = [q, k, w, sink]
    return [(lambda backend: run(backend, False), inputs), (lambda backend: run(backend, True), inputs)]


def _heads_cases(R: int, V: int, dtype: torch.dtype, device: str) -> list[tuple[Callable, list[Tensor]]]:
    from llm_mlp.ops.heads import head_inputs, head_outputs

    B, T, G, m, K = 2, 300, 2, 2, 4
    width, C = G * m * V, 2 * G * R + G * m * V
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    if not R:  # what comes after the ops has none
        rows = (B, T, G, m)
        inputs = [x.to(dtype) for x in (normal(*rows, V), normal(*rows, V), normal(*rows), normal(B, T, width))]
        return [(lambda backend: lambda *x: [head_outputs(*x, eps=1e-6, backend=backend)], inputs)]

    def run(backend: str) -> Callable:
        def call(x: Tensor, conv: Tensor, slope: Tensor, write: Tensor, gain: Tensor, *tail: Tensor):
            found, new = head_inputs(
                x, conv, slope, write, gain, *tail,
                groups=G, heads=(m, V), eps=1e-6, backend=backend,
            )  # fmt: skip
            return [y for y in (*found, new) if y is not None]

        return call

    inputs = [normal(B, T, C).to(dtype), normal(C, K) / 2, 1 + normal(C) / 4]
    inputs += [normal(B, T, width).to(dtype), 1 + normal(2, R) / 4]
    return [(run, inputs), (run, [*inputs, normal(B, K - 1, C).to(dtype)])]


def _cross_entropy_cases(dtype: torch.dtype, device: str) -> list[tuple[Callable, list[Tensor]]]:
    from llm_mlp.ops.cross_entropy import linear_cross_entropy

    n, D, vocabulary = 300, 64, 5003
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn((r, D), generator=generator).to(dtype).to(device) for r in (n, vocabulary))
    targets = torch.randint(vocabulary, (n,), generator=generator).to(device)
    targets[::7] = -100

    def run(cap: float) -> Callable:
        def of(backend: str) -> Callable:
            return lambda h, w: [linear_cross_entropy(h, w, targets, cap=cap, backend=backend)]

        return of

    return [(run(0.0), [hidden, weight]), (run(15.0), [hidden, weight])]


_CASES: dict[str, Callable[..., list[tuple[Callable, list[Tensor]]]]] = {
    "perceive": _perceive_cases,
    "memorise": _memorise_cases,
    "heads": _heads_cases,
    "cross_entropy": _cross_entropy_cases,
}


def check(op: str, sizes: Sizes, device: str) -> list[str]:
    """What the kernels of an op get wrong at these sizes on a device, as text; empty if nothing."""
    constants: dict[str, Any] = dict(sizes)
    dtype = getattr(torch, constants.pop("dtype"))
    # Beside 16-bit inputs the kernels multiply float32 in fewer bits; so may the yardstick.
    torch.set_float32_matmul_precision("highest" if dtype == torch.float32 else "high")
    cases = _CASES[op](**constants, dtype=dtype, device=device)
    failures = []
    for number, (run, inputs) in enumerate(cases):
        truth = both_ways(run("chunked"), [x.double() for x in inputs])
        yard, got, again = (both_ways(run(backend), inputs) for backend in ("chunked", "triton", "triton"))
        names = [f"case {number}, tensor {n}" for n in range(len(got))]
        failures += compare(names, got, yard, truth)
        failures += [
            f"{n}: two runs differ" for n, a, b in zip(names, got, again, strict=True) if not torch.equal(a, b)
        ]
    return failures


def main() -> None:
    spec = json.loads(sys.argv[1])
    sizes = tuple((name, size) for name, size in spec["sizes"])
    _known[spec["op"], sizes] = Plan(*spec["plan"]), ""
    try:
        found = check(spec["op"], sizes, spec["device"])
    except Exception as error:  # whatever a compiler or a device says: the kernels do not run here
        found = [f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"]
    print(json.dumps(found), flush=True)
    os._exit(0)  # a lost device may not let the interpreter end
