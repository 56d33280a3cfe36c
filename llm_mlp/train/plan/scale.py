"""A preset made larger or smaller: ``--params N``."""

from __future__ import annotations

import math

from llm_mlp.config import ConfigError, ModelConfig, build
from llm_mlp.models import model_cost
from llm_mlp.train.plan.figures import PlanError

WIDTH_SHARE = 0.4  # width grows as N^0.4, depth as N^0.2, so that depth x width^2 grows as N
REACH = 0.15  # how far from what is asked the count may be: a layer more or less of a small model is much
MAX_HEADS = 512  # `PerceptionConfig`'s and `AttentionConfig`'s


def scaled(preset: str, parameters: float | None) -> ModelConfig:
    """The preset with about ``parameters`` parameters (None: as it is), embedding and head included.

    The rule (docs/plan.md): R, F, block, slots, the vocabulary and the width of a group (D / G) stay; D grows as
    N^0.4 and L as N^0.2 above the preset's; D in steps of eight groups from 8,192 on (they divide among the GPUs of a
    node), of four from 2,048 on; L in steps of four from 40 layers on; the FFN keeps its ratio to D, in steps of 64.
    Where the heads would pass 512, a group has half as many of twice the values' width. Of the three widths nearest to
    N^0.4, with the depth that suits each, the one is taken whose count (`model_cost`, which equals the built model's)
    and width are nearest to what is wanted.

    Raises:
        PlanError: an unknown preset, or a count that the rule does not come near.
    """
    try:
        base = build(ModelConfig, {"preset": preset}, "--preset")
    except ConfigError as error:
        raise PlanError(str(error)) from None
    if parameters is None:
        return base
    own = model_cost(base).parameters
    if not math.isfinite(parameters) or parameters < 1:
        raise PlanError(f"--params {parameters:g}: expected the number of parameters, for example 7e9")
    growth = parameters / own
    unit = base.d_model // base.perception.groups if "perception" in base.mixers else 2 * base.attention.head_dim
    if "attention" in base.mixers:
        unit = math.lcm(unit, base.attention.head_dim)
    aim = base.d_model * growth**WIDTH_SHARE
    step = unit * (8 if aim >= 8192 else 4 if aim >= 2048 else 1)
    nearest = round(aim / step)
    sizes = []
    for k in (nearest - 1, nearest, nearest + 1):
        width = max(1, k) * step
        layer = (_sized(base, width, 2), _sized(base, width, 1))
        per = model_cost(layer[0]).parameters - model_cost(layer[1]).parameters
        layers = max(1, round((parameters - model_cost(layer[1]).parameters) / per) + 1)
        if layers >= 40:
            layers = round(layers / 4) * 4
        found = _sized(base, width, layers)
        sizes.append((_off(found, parameters) + abs(math.log(width / aim)) / 2, found))
    best = min(sizes, key=lambda size: size[0])[1]
    if _off(best, parameters) > REACH:
        raise PlanError(
            f"--params {parameters:g}: the nearest size of {preset} has {model_cost(best).parameters:,}; its embedding "
            f"and head alone have {2 * base.vocab_size * unit:,} or more. Start from another --preset"
        )
    return best


def _off(config: ModelConfig, parameters: float) -> float:
    return abs(model_cost(config).parameters / parameters - 1)


def _sized(base: ModelConfig, width: int, layers: int) -> ModelConfig:
    p, a = base.perception, base.attention
    groups = width * p.groups // base.d_model
    heads, value = p.heads_per_group, p.value_width
    while groups * heads > MAX_HEADS and heads % 2 == 0:
        heads, value = heads // 2, value * 2
    values = base.model_dump(mode="json") | {"d_model": width, "n_layers": layers}
    values["ffn"]["hidden"] = round(base.ffn.hidden * width / base.d_model / 64) * 64
    if "perception" in base.mixers:
        values["perception"] |= {"groups": groups, "heads_per_group": heads, "value_width": value}
    if "attention" in base.mixers:
        values["attention"]["heads"] = width // a.head_dim
    try:
        return build(ModelConfig, values, f"--params: a model of width {width}")
    except ConfigError as error:
        raise PlanError(str(error)) from None
