"""Model presets: one row each, and a transformer twin of equal vocabulary and (within 3 %) parameters.

A preset's name counts parameters without the token embedding (with the head), as its FLOPs do.
"""

from __future__ import annotations

import difflib
from typing import Any

# Perception presets start from R = F = 128, block 256, 64 slots, ReLU^2 read and contractive erase (architecture,
# section 4). H = groups * heads_per_group; the twin's FFN is widened by what the perception mixer has more.
#            D     L   G   m   R    F    V   block slots  FFN   vocab  | twin: heads head_dim  FFN
_TABLE = {
    "demo": (192, 4, 2, 16, 128, 128, 16, 256, 64, 576, 2048, 3, 64, 1264),
    "30m": (512, 8, 4, 8, 128, 128, 16, 256, 64, 2048, 8192, 8, 64, 2208),
    "125m": (768, 14, 6, 8, 128, 128, 16, 256, 64, 3072, 32768, 12, 64, 3264),
    "360m": (1024, 24, 8, 4, 128, 128, 32, 256, 64, 4096, 32768, 16, 64, 4288),
    "900m": (1536, 28, 12, 4, 128, 128, 32, 256, 64, 6144, 32768, 24, 64, 6336),
}
TWIN = "-transformer"


def preset_names() -> list[str]:
    """All preset names, twins included."""
    return [name + end for name in _TABLE for end in ("", TWIN)]


def preset(name: str) -> dict[str, Any]:
    """The fields of `ModelConfig` of a preset, as plain data.

    Raises:
        ValueError: unknown name; the message suggests the nearest.
    """
    base = name.removesuffix(TWIN)
    if base not in _TABLE:
        near = difflib.get_close_matches(name, preset_names(), n=1, cutoff=0.3)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown preset {name!r}; {hint}known: {', '.join(preset_names())}")
    D, L, G, m, R, F, V, block, slots, ffn, vocabulary, heads, head_dim, twin_ffn = _TABLE[base]
    model: dict[str, Any] = {"vocab_size": vocabulary, "d_model": D, "n_layers": L}
    if name.endswith(TWIN):
        model |= {"pattern": ["attention"], "attention": {"heads": heads, "head_dim": head_dim}}
        return model | {"ffn": {"hidden": twin_ffn}}
    perception = {
        "groups": G,
        "heads_per_group": m,
        "read_width": R,
        "features": F,
        "value_width": V,
        "block": block,
        "slots": slots,
    }
    return model | {"perception": perception, "ffn": {"hidden": ffn}}
