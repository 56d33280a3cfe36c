"""Configs: what YAML and overrides mean, what is refused and how the message helps."""

from __future__ import annotations

from typing import Any

import pytest
from model_cases import CASES, config_of
from pydantic import ValidationError

from llm_mlp.config import (
    Config,
    ConfigError,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PerceptionConfig,
    TrainConfig,
    apply_overrides,
    build,
    diff,
    dump,
    load,
)
from llm_mlp.presets import preset_names


@pytest.fixture
def write(tmp_path):
    def written(text: str):
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf8")
        return path

    return written


# -- there and back ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_dump_and_load_a_model(case, write):
    config = config_of(case)
    assert load(ModelConfig, write(dump(config))) == config


@pytest.mark.parametrize("name", preset_names())
def test_dump_and_load_a_preset(name, write):
    config = build(TrainConfig, {"model": name})
    text = dump(config)
    assert "preset" not in text  # the values themselves: a later table changes nothing
    assert load(TrainConfig, write(text)) == config


def test_dump_and_load_a_run(write):
    config = build(
        TrainConfig,
        {
            "model": {"preset": "30m", "pattern": ["perception", "attention"], "dropout": 0.1},
            "data": {"sources": [{"path": "a.jsonl", "weight": 2.5}, {"path": "ü.txt"}], "packing": "reset"},
            "optimizer": {"lr": 1e-5, "betas": [0.8, 0.99]},
        },
    )
    assert load(TrainConfig, write(dump(config))) == config
    assert config.model.pattern == ("perception", "attention") and config.data.sources[0].weight == 2.5
    assert load(TrainConfig, None) == TrainConfig() == load(TrainConfig, write("")) == build(TrainConfig, {})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4e-3", 4e-3),
        ("4.e-3", 4e-3),
        ("4.0e-3", 4e-3),
        ("1e+2", 100.0),
        ("1E-4", 1e-4),
        ("0.5", 0.5),
        ("1", 1.0),
        ("5e5", 5e5),
    ],
)
def test_yaml_numbers(text, value, write):
    """YAML 1.1 reads 4e-3 as a string; here it is the number it looks like."""
    assert load(OptimizerConfig, write(f"lr: {text}")).lr == value
    assert load(TrainConfig, None, [f"optimizer.lr={text}"]).optimizer.lr == value


def test_configs_are_immutable():
    config = TrainConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.steps = 3
    assert hash(config) == hash(TrainConfig())


# -- overrides ---------------------------------------------------------------------------------------------------


def test_overrides(write):
    path = write("model: 30m\nsteps: 50\noptimizer: {lr: 1e-3, clip: 0.5}\n")
    config = load(
        TrainConfig,
        path,
        [
            "optimizer.lr=4e-3",
            "model.n_layers=4",
            "model.pattern=[attention, perception]",
            "model.perception.read=softmax",
            "compile=true",
            "model.perception.half_life=[4, 100.5]",
            "out=runs/a=b",
        ],
    )
    assert config.optimizer.lr == 4e-3 and config.optimizer.clip == 0.5 and config.steps == 50
    assert config.model.n_layers == 4 and config.model.mixers == ("attention", "perception") * 2
    assert config.model.perception.read == "softmax" and config.model.perception.groups == 4
    assert config.compile is True and config.model.perception.half_life == (4.0, 100.5)
    assert config.out == "runs/a=b"
    # The last one wins; a preset can be overridden too.
    assert load(TrainConfig, path, ["steps=1", "steps=2"]).steps == 2
    assert load(TrainConfig, path, ["model=demo"]).model == build(ModelConfig, {"preset": "demo"})
    assert load(TrainConfig, path, ["model.preset=demo"]).model == build(ModelConfig, {"preset": "demo"})
    assert load(ModelConfig, None, ["preset=30m", "n_layers=3"]).n_layers == 3


def test_overrides_do_not_change_their_argument():
    values = {"optimizer": {"lr": 1.0}}
    assert apply_overrides(values, ["optimizer.lr=2.0"]) == {"optimizer": {"lr": 2.0}}
    assert values == {"optimizer": {"lr": 1.0}}


@pytest.mark.parametrize("override", ["steps", "=3", ""])
def test_overrides_without_a_name_or_a_value(override):
    with pytest.raises(
        ConfigError, match=rf"override '{override}': expected NAME=VALUE, for example optimizer.lr=4e-3"
    ):
        load(TrainConfig, None, [override])


def test_overrides_that_are_not_yaml():
    with pytest.raises(ConfigError, match="override 'steps=\\[1': "):
        load(TrainConfig, None, ["steps=[1"])


# -- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (TrainConfig, {"stepz": 3}, r"stepz: unknown field; did you mean 'steps'\?"),
        (
            TrainConfig,
            {"optimizer": {"learning": 1.0}},
            r"optimizer.learning: unknown field; (did you mean|known fields: name, lr,)",
        ),
        (
            TrainConfig,
            {"optimizer": {"weight_dacay": 0.1}},
            r"optimizer.weight_dacay: unknown field; did you mean 'weight_decay'\?",
        ),
        (
            TrainConfig,
            {"model": {"perception": {"headz_per_group": 1}}},
            r"model.perception.headz_per_group: unknown field; did you mean 'heads_per_group'\?",
        ),
        (ModelConfig, {"percepton": {}}, r"percepton: unknown field; did you mean 'perception'\?"),
        (ModelConfig, {"preset": "30m", "n_layer": 3}, r"n_layer: unknown field; did you mean 'n_layers'\?"),
        (
            DataConfig,
            {"sources": [{"path": "a", "wieght": 1.0}]},
            r"sources.0.wieght: unknown field; did you mean 'weight'\?",
        ),
        (TrainConfig, {"zzz": 1}, r"zzz: unknown field; known fields: model, data, "),
    ],
)
def test_unknown_fields_suggest_the_nearest(cls, values, message):
    with pytest.raises(ConfigError, match=message):
        build(cls, values)


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (TrainConfig, {"steps": "3"}, r"steps: .*integer.*\(got '3'\)"),
        (TrainConfig, {"steps": 3.5}, r"steps: .*\(got 3.5\)"),
        (TrainConfig, {"steps": True}, r"steps: .*integer"),
        (TrainConfig, {"steps": None}, r"steps: .*integer"),
        (TrainConfig, {"steps": 0}, r"steps: .*greater than or equal to 1.*\(got 0\)"),
        (TrainConfig, {"compile": "yes"}, r"compile: .*boolean.*\(got 'yes'\)"),
        (TrainConfig, {"precision": "fp8"}, r"precision: .*'fp32', 'bf16', 'fp16' or 'fp64'.*\(got 'fp8'\)"),
        (TrainConfig, {"optimizer": 3}, r"optimizer: .*\(got 3\)"),
        (OptimizerConfig, {"lr": "fast"}, r"lr: .*number.*\(got 'fast'\)"),
        (OptimizerConfig, {"lr": float("nan")}, "lr: "),
        (OptimizerConfig, {"betas": [0.9]}, "betas"),
        (ModelConfig, {"pattern": []}, "pattern: .*at least 1"),
        (ModelConfig, {"pattern": ["mamba"]}, r"pattern.0: .*'perception' or 'attention'.*\(got 'mamba'\)"),
        (ModelConfig, {"pattern": "attention"}, "pattern: "),
        (ModelConfig, {"dropout": 1.0}, r"dropout: .*less than 1"),
        (PerceptionConfig, {"erase_max": 2.0}, r"erase_max: .*1.98.*\(got 2.0\)"),
        (PerceptionConfig, {"half_life": [100.0, 8.0]}, "half_life = .* must be .shortest, longest."),
    ],
)
def test_ill_typed_values(cls, values, message):
    with pytest.raises(ConfigError, match=message):
        build(cls, values)


@pytest.mark.parametrize(
    ("text", "value"),
    [("off", "off"), ("on", "on"), ("no", "no"), ("true", True), ("False", False), ("010", 10), ("0x10", 16)]
    + [("1_000", 1000), ("-3", -3), ("4e-3", 4e-3), ("1.5", 1.5), ("~", None), ("12:30", "12:30")],
)
def test_yaml_is_read_as_it_looks(text, value):
    (found,) = apply_overrides({}, [f"x={text}"]).values()
    assert found == value and type(found) is type(value)


def test_every_bad_field_is_named():
    with pytest.raises(ConfigError, match=r"^run.yaml: (?=.*stepz)(?=.*optimizer\.lr)(?=.*micro)") as error:
        build(TrainConfig, {"stepz": 1, "optimizer": {"lr": "x"}, "micro_batch": -1}, "run.yaml")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("groups", "heads", "fits"),
    [(1, 1, True), (16, 32, True), (19, 27, False), (1, 513, False), (0, 4, False), (4, 0, False)],
)
def test_heads_are_1_to_512(groups, heads, fits):
    values: dict[str, Any] = {"groups": groups, "heads_per_group": heads}
    if fits:
        assert build(PerceptionConfig, values).heads == groups * heads
        return
    with pytest.raises(ConfigError, match=r"allowed are 1 to 512|greater than or equal to 1"):
        build(PerceptionConfig, values)


def test_the_message_counts_the_heads():
    with pytest.raises(ConfigError, match=r"groups \* heads_per_group = 600 perception heads; allowed are 1 to 512"):
        build(PerceptionConfig, {"groups": 20, "heads_per_group": 30})
    with pytest.raises(ConfigError, match="heads = 600; allowed are 1 to 512"):
        build(ModelConfig, {"attention": {"heads": 600, "head_dim": 2}})


@pytest.mark.parametrize("field", ["read_width", "features", "value_width"])
@pytest.mark.parametrize("value", [0, -4, 3, 96, 1000])
def test_powers_of_two(field, value):
    with pytest.raises(ConfigError, match=rf"{field} = {value} is not a power of two"):
        build(PerceptionConfig, {field: value})


@pytest.mark.parametrize("value", [1, 2, 16, 1024])
def test_powers_of_two_are_taken(value):
    assert build(PerceptionConfig, {"value_width": value}).value_width == value
    assert build(PerceptionConfig, {"read_width": 1, "features": value}).features == value


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (PerceptionConfig, {"features": 64}, "features = 64 must be at least read_width = 128"),
        (PerceptionConfig, {"block": 0}, "slots = 64 needs block > 0"),
        (
            ModelConfig,
            {"pattern": ["attention"], "d_model": 256},
            r"attention.heads \* attention.head_dim = 512 must equal d_model = 256",
        ),
        (ModelConfig, {"attention": {"head_dim": 7}}, r"head_dim = 7 must be even"),
        (
            ModelConfig,
            {"ffn": {"activation": "adaptive", "hidden": 100}},
            "hidden = 100 is not a multiple of adaptive_groups = 8",
        ),
        (
            ModelConfig,
            {"n_layers": 3, "routing": {"last_layers": 3}},
            "routing.last_layers = 3 must be below n_layers = 3",
        ),
        (TrainConfig, {"batch_size": 10, "micro_batch": 4}, "micro_batch = 4 does not divide batch_size = 10"),
    ],
)
def test_values_that_do_not_fit_together(cls, values, message):
    with pytest.raises(ConfigError, match=message):
        build(cls, values)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.n_layers=3", "parallel.pipeline=4"], "pipeline = 4 makes 4 stages of model.n_layers = 3"),
        (
            ["model.n_layers=7", "parallel.pipeline=4", "parallel.schedule=interleaved"],
            "pipeline = 4 makes 8 stages of model.n_layers = 7",
        ),
        (["parallel.pipeline=2", "model.tie_embeddings=true"], "cannot be combined with model.tie_embeddings"),
        (["parallel.pipeline=2", "parallel.context=2"], "cannot be combined with parallel.context > 1"),
        (["parallel.pipeline=2", "cuda_graph=true"], "cannot be combined with cuda_graph = true"),
        (["parallel.pipeline=2", "precision=fp16"], "cannot be combined with precision = fp16"),
        (["parallel.pipeline=2", "micro_batch=auto"], "cannot be combined with micro_batch = auto; give a number"),
        (["parallel.pipeline=2", "micro_batch=0"], "cannot be combined with micro_batch = 0; give a number"),
        (["parallel.schedule=interleaved"], "schedule = interleaved is for pipeline > 1"),
        (["parallel.pipeline=2", "parallel.stages_per_process=3"], "stages_per_process is for schedule = interleaved"),
    ],
)
def test_what_a_pipeline_is_not_combined_with(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load(TrainConfig, None, ["micro_batch=4", *overrides])
    assert load(TrainConfig, None, ["micro_batch=4", "parallel.pipeline=2"]).parallel.stages == 2


def test_widths_are_checked_where_they_are_used():
    """Attention's widths say nothing to a model without attention, nor groups of an FFN that is not adaptive."""
    assert build(ModelConfig, {"d_model": 256}).d_model == 256
    assert build(ModelConfig, {"ffn": {"hidden": 100}}).ffn.hidden == 100
    # A pattern that is longer than the model: the mixer that no layer uses is not checked either.
    assert build(ModelConfig, {"d_model": 256, "n_layers": 1, "pattern": ["perception", "attention"]}).n_layers == 1


# -- files -------------------------------------------------------------------------------------------------------


def test_bad_files(write, tmp_path):
    with pytest.raises(ConfigError, match=r"none.yaml: no such config file"):
        load(TrainConfig, tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r"config.yaml: not valid YAML"):
        load(TrainConfig, write("steps: [1"))
    with pytest.raises(ConfigError, match=r"config.yaml: expected fields and values, got list"):
        load(TrainConfig, write("- steps"))
    with pytest.raises(ConfigError, match=r"config.yaml: stepz: unknown field"):
        load(TrainConfig, write("stepz: 3"))
    with pytest.raises(ConfigError, match="expected fields and values, got int"):
        build(TrainConfig, 3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="steps|date"):
        load(TrainConfig, write("steps: 2020-01-01"))
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00steps")
    with pytest.raises(ConfigError, match=r"binary.yaml: not valid YAML"):
        load(TrainConfig, path)
    with pytest.raises(ConfigError, match="directory"):
        load(TrainConfig, tmp_path)


# -- what differs ------------------------------------------------------------------------------------------------


def test_diff():
    old, new = (
        TrainConfig(),
        build(TrainConfig, {"optimizer": {"lr": 1e-3}, "model": {"perception": {"slots": 3}}, "seed": 4}),
    )
    assert diff(old, new) == [
        "model.perception.slots: 64 -> 3",
        "optimizer.lr: 0.004 -> 0.001",
        "seed: 0 -> 4",
    ]
    assert diff(old, TrainConfig()) == []


def _fields(cls: type[Config], prefix: str = "") -> list[tuple[str, Any]]:
    out = []
    for name, field in cls.model_fields.items():
        kind = field.annotation
        inner = isinstance(kind, type) and issubclass(kind, Config)
        out += _fields(kind, f"{prefix}{name}.") if inner else [(prefix + name, field)]
    return out


@pytest.mark.parametrize(("name", "field"), _fields(ModelConfig))
def test_every_field_has_a_default(name, field):
    assert not field.is_required(), name


def test_a_cuda_graph_needs_batches_of_one_shape():
    with pytest.raises(ConfigError, match=r"cuda_graph = true .* data\.packing = joined"):
        build(TrainConfig, {"cuda_graph": True, "data": {"packing": "reset"}})
    assert build(TrainConfig, {"cuda_graph": True, "data": {"packing": "joined"}, "precision": "bf16"}).cuda_graph
