"""The direction of imports: a folder imports only from those above it, and nothing heavy comes with --help."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import llm_mlp

ROOT = Path(llm_mlp.__file__).parent
# From the top down. What stands in one row does not import each other.
LAYERS = [
    ["presets", "allocator", "energy", "page"],
    ["config", "ops"],
    ["models", "data", "device"],
    ["precision"],
    ["weights"],
    ["checkpoint"],
    ["infer", "eval"],
    ["context", "bench"],
    ["train", "doctor", "serve"],
    ["recipes"],
    ["cli"],
    ["__main__"],
]
LEVEL = {name: i for i, row in enumerate(LAYERS) for name in row}


def part(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(path: Path) -> set[str]:
    """The parts of llm_mlp that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [
                f"{node.module}.{alias.name}" if node.module == "llm_mlp" else str(node.module) for alias in node.names
            ]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("llm_mlp.")}
    return found - {"__version__"}


def test_every_part_has_a_level():
    assert {part(path) for path in ROOT.rglob("*.py")} - {"__init__"} == LEVEL.keys()


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_upwards(path):
    own = part(path)
    if own == "__init__":
        assert not imports(path)
        return
    for other in imports(path) - {own}:
        assert LEVEL[other] < LEVEL[own], f"{own} imports {other}"


def test_ops_import_torch_and_triton_only():
    allowed = set(sys.stdlib_module_names) | {"torch", "triton", "llm_mlp"}
    for path in (ROOT / "ops").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                assert str(name).split(".")[0] in allowed, f"{path}: {name}"


def test_help_is_quick():
    code = "import sys; sys.argv = ['llm-mlp', '--help']\nimport llm_mlp.cli as c\n"
    code += "try: c.main()\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'numpy', 'matplotlib', 'tensorboard'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "perception heads" in done.stdout
