"""Named runs: YAML files that `llm-mlp train NAME` finds without a path."""

from __future__ import annotations

from pathlib import Path


def recipe_names() -> list[str]:
    return sorted(p.stem for p in Path(__file__).parent.glob("*.yaml"))


def find(name: str) -> Path:
    """A config file: a path, or the name of a recipe that ships with the package.

    Raises:
        FileNotFoundError: neither; the message lists the recipes.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = Path(__file__).parent / f"{name}.yaml"
    if shipped.is_file():
        return shipped
    raise FileNotFoundError(f"{name}: no such config file or recipe; recipes: {', '.join(recipe_names())}")
