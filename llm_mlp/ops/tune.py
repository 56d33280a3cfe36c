"""Which launch of the kernels a device gets right: checked against float64 before ``auto`` may choose it.

Compilers miscompile some kernels of this family on some GPUs (Triton 3.4 to 3.7 on Hopper: flash-linear-attention
issues 640, 984 and 1262; the last traces it to the assembler that Triton brings for Hopper, ptxas 12.8, and finds 13.1
right), silently or by an illegal access. So the newest assembler at hand is tried first, and the kernels are checked
once for each device, compiler and set of sizes, forward and backward (`llm_mlp.ops.checks` has the rule and the
inputs). The check runs in a process of its own, because a miscompiled kernel can take the process's device with it,
and what it found is kept in a file: in ``$LLM_MLP_CACHE``, else ``$XDG_CACHE_HOME/llm_mlp``, else
``~/.cache/llm_mlp``. A run's checkpoints hold it too (`choices`, `go_by`), so that a run that is resumed elsewhere
launches what it launched before.
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
from collections.abc import Iterator, Sequence
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


class Found(NamedTuple):
    """What a check found: what fails, as text, and of the memorised rows that float64 chooses (of a few sequences and
    all groups, where the op chooses any) how many there are and how many the kernels do not choose. These are no
    failures by themselves: where the kernels compute the scores, two of them may lie within rounding."""

    failures: list[str]
    slots: int = 0
    differing: int = 0


ASSEMBLER = "TRITON_PTXAS_PATH"  # as Triton reads it
SYSTEM_ASSEMBLER = "/usr/local/cuda/bin/ptxas"
_known: dict[tuple[str, Sizes], tuple[Plan | None, str]] = {}  # the plan that passed, or why none did
_rows: dict[str, Any] = {}  # outcomes of checks that this process goes by, as the file holds them


def choices() -> dict[str, Any]:
    """What was found about the kernels that this process has asked about: plain data for `go_by`."""
    return dict(_rows)


def go_by(rows: dict[str, Any]) -> None:
    """From here on choose as ``rows`` (`choices` of another process) say, where they are about this device, compiler
    and code; what was chosen already stays."""
    known = plans() if rows and find_spec("triton") else []
    _rows.update({key: row for key, row in rows.items() if row["plan"] is None or Plan(*row["plan"]) in known})


def plan(op: str, sizes: Sizes) -> Plan:
    """How an op's kernels run: the plan that passed, else the first."""
    return _known.get((op, sizes), (None, ""))[0] or Plan()


FEW = 1  # sequences whose steps leave most of a GPU idle: there waiting for the next kernel's start is what takes time


def overlap(like: Tensor, sequences: int) -> dict[str, bool]:
    """How a step's kernel is launched beside its neighbours: for few sequences, on GPUs that can (compute capability
    9.0 and up), it starts while the one before it ends; `llm_mlp.ops.tiles.after_previous` then waits in it."""
    able = like.is_cuda and sequences <= FEW and torch.cuda.get_device_capability(like.device) >= (9, 0)
    return {"PDL": True, "launch_pdl": True} if able else {"PDL": False}


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
    for place in getattr(find_spec("nvidia"), "submodule_search_locations", None) or ():  # pip install nvidia-cuda-nvcc
        found += sorted(map(str, Path(place).glob("*/bin/ptxas")))
    best, best_version = "", assembler_version(str(own / "ptxas"))
    for path in found:
        if (number := assembler_version(path)) > best_version:
            best, best_version = path, number
    return best


def assembler_version(path: str) -> tuple[int, ...]:
    """Of the ptxas at ``path``; empty if there is none."""
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
    kept = {**_read(file), **_rows}
    if key not in kept:
        what = ", ".join(f"{name} = {size}" for name, size in sizes)
        log.info("%s: checking the kernels for %s against float64 (once for this device, under a minute)", op, what)
        failures: list[str] = []
        passed, found = None, Found([])
        for way in plans():
            found = check_apart(op, sizes, way, device)
            if not found.failures:
                passed = way
                break
            failures.append(f"{way}: {'; '.join(found.failures)}")
        kept[key] = {"plan": passed, "failures": failures, "slots": found.slots, "differing": found.differing}
        if passed is None:
            log.warning(
                "%s: the kernels are wrong here for %s and will not be used: %s", op, what, " | ".join(failures)
            )
        elif found.slots:
            log.info("%s: %d of %d memorised rows are other than float64 chooses", op, found.differing, found.slots)
        _write(file, {**_read(file), key: kept[key]})
    row = _rows[key] = kept[key]
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


# -- the check, in a process of its own -------------------------------------------------------------------------------


def check_apart(op: str, sizes: Sizes, way: Plan, device: str) -> Found:
    """`check` of a plan in a process of its own."""
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
        return Found([f"the check took over {TIMEOUT} s"])
    except OSError as error:
        return Found([f"the check did not start: {error}"])
    lines = [line for line in done.stdout.splitlines() if line.startswith("[")]
    if not lines:
        return Found([f"the check ended with {done.returncode}: {done.stderr.strip()[-200:]}"])
    return Found(*json.loads(lines[-1]))


def main() -> None:
    spec = json.loads(sys.argv[1])
    sizes = tuple((name, size) for name, size in spec["sizes"])
    _known[spec["op"], sizes] = Plan(*spec["plan"]), ""
    try:
        from llm_mlp.ops.checks import check  # which knows the ops, and they this module

        found = check(spec["op"], sizes, spec["device"])
    except Exception as error:  # whatever a compiler or a device says: the kernels do not run here
        found = Found([f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"])
    print(json.dumps(found), flush=True)
    os._exit(0)  # a lost device may not let the interpreter end
