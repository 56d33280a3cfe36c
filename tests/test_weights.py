"""Weights in fewer bits, states kept in fewer: what is held, what is read, what is refused."""

from __future__ import annotations

import copy
import logging

import pytest
import torch

from llm_mlp import weights as module
from llm_mlp.checkpoint import CheckpointError, save_model
from llm_mlp.config import ModelConfig, build
from llm_mlp.doctor import examine
from llm_mlp.infer import Engine, Request, Sampling, slots_within, state_bytes
from llm_mlp.models import LM, build_model
from llm_mlp.models.mixer import STATES
from llm_mlp.ops.linear_step.quantized import Int4, Int8
from llm_mlp.weights import QuantizedLinear, exact_copy, hold, weight_bytes


def small(**more) -> LM:
    """Wide enough that its projections are quantised; blocks short enough that slots are taken."""
    perception = {"block": 16, "slots": 8}
    config = {"preset": "demo", "n_layers": 2, "vocab_size": 320, "perception": perception, **more}
    return build_model(build(ModelConfig, config)).randomize_().eval()


def tokens(n: int, rows: int = 1) -> torch.Tensor:
    return torch.randint(320, (rows, n), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("weights", "of_matrices"), [("int8", Int8), ("int4", Int4)])
def test_what_is_quantised(weights, of_matrices):
    model = hold(small(), weights)
    kinds = {n: m.kind for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    layer = ("mixer.in_proj", "mixer.out_proj", "ffn.up", "ffn.down")
    assert kinds == {f"blocks.{i}.{n}": of_matrices for i in range(2) for n in layer} | {"head": Int8}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and model.quantization == weights
    plain = hold(small(), "bf16")
    share = weight_bytes(model) / weight_bytes(plain)
    quantised = sum(m.matrix.shape.numel() for m in model.modules() if isinstance(m, QuantizedLinear))
    saved = 1 if weights == "int8" else 1.44  # of two bytes; 4 bits have scales, and the head has 8
    assert share < 1 - 0.95 * saved * quantised / weight_bytes(plain)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_reading_and_steps_are_those_of_what_the_numbers_stand_for(weights):
    model, ids = hold(small(), weights), tokens(40, 2)
    truth, plain = exact_copy(model), hold(exact_copy(model), "bf16")
    want = truth(ids).logits.log_softmax(-1)
    state = model.init_state(2)
    steps = torch.stack([model.step(ids[:, t], state) for t in range(40)], 1)
    yard = (plain(ids).logits.log_softmax(-1) - want).square().mean().sqrt()
    for got in (model(ids).logits, steps):
        assert (got.log_softmax(-1) - want).square().mean().sqrt() < 2 * yard
    with torch.no_grad():
        loss = model(ids[:, :-1], targets=ids[:, 1:]).loss
    assert float(loss) == pytest.approx(float(truth(ids[:, :-1], targets=ids[:, 1:]).loss.detach()), rel=0.02)


def test_a_quantised_model_is_neither_saved_nor_quantised_again(tmp_path):
    model = hold(small(), "int8")
    with pytest.raises(CheckpointError, match="int8 weights are not saved"):
        save_model(tmp_path / "model", model, None)
    with pytest.raises(ValueError, match="weights int4: the model's are int8; load it again"):
        hold(model, "int4")
    with pytest.raises(ValueError, match="weights 'int3': expected fp32, bf16, fp16, int8, int4"):
        hold(small(), "int3")
    with pytest.raises(ValueError, match=r"state 'fp8': expected auto, fp32\+bf16"):
        model.keep_state("fp8")


@pytest.mark.parametrize(
    ("slow", "says"), [(None, ""), (0, "in products of 1 rows"), (1, "of 16 rows"), (2, "of 32 rows")]
)
def test_a_slower_choice_is_logged(slow, says, monkeypatch, caplog):
    """Also above the sequences that the kernel serves, where int8 matrices are widened for each product."""
    times = iter([x for n in range(3) for x in (5e-6, 9e-6 if n == slow else 2e-6)])
    monkeypatch.setattr(module, "_seconds", lambda call, device: call() and next(times))
    with caplog.at_level(logging.INFO, "llm_mlp"):
        hold(small(), "int8")
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "int8 weights: 9 matrices in 8 bits, 0 in 4" in caplog.text
    assert len(warnings) == bool(says) and all(says in w and "one takes 9 us, 5 in bf16" in w for w in warnings)


@pytest.mark.parametrize("setting", STATES)
@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_states_are_kept_as_chosen(setting, weights):
    model, ids = hold(small(), weights).keep_state(setting), tokens(40)
    fast, rows = STATES[setting]
    own = module.activations(weights)
    state, read = model.init_state(1), model(ids).state
    for t in range(40):
        model.step(ids[:, t], state)
    for found in (state, read):
        for name, t in found.items():
            part = name.split(".", 2)[2]
            want = {"fast_weights": fast or torch.float32, "units.keys": rows or own, "units.values": rows or own}
            assert t.dtype == want.get(part, {"conv": own}.get(part, t.dtype)), name
    # A token's row is rounded alike, whichever way it is read: in the first layer few numbers differ, by a last bit.
    for name in ("layers.0.units.keys", "layers.0.units.values") if rows == torch.float8_e4m3fn else ():
        a, b = (x[name][:, :, 8:].float() for x in (state, read))  # the open block: slots may be chosen otherwise
        assert ((a - b).abs() > 1e-5 * b.abs()).float().mean() < 0.1


def test_bytes_of_the_settings_are_those_of_the_slots():
    model = small()
    sizes = [state_bytes(hold(copy.deepcopy(model), "bf16").keep_state(s)) for s in list(STATES)[1:]]
    assert sizes[0] > sizes[1] > sizes[2]
    c = model.config.perception
    fast = 2 * c.heads * c.value_width * c.features  # two layers
    rows = 2 * (c.block + c.slots) * (c.groups * c.read_width + c.heads * c.value_width)
    assert sizes[0] - sizes[1] == 2 * fast and sizes[1] - sizes[2] == rows
    kept = hold(model, "bf16").keep_state("bf16+8bit")
    assert slots_within(kept, 99, 10 * sizes[2])[0] == 10
    assert sum(t.numel() * t.element_size() for t in Engine(kept, slots=3).pool.values()) == 3 * sizes[2]


@torch.no_grad()
def test_rows_saturate():
    model, ids = hold(small(), "bf16").keep_state("bf16+8bit"), tokens(40)
    for block in model.blocks:
        block.mixer.units_gain[1] *= 3000  # of keys
        block.mixer.write_up.bias += 20
        block.mixer.in_proj.weight[2 * 2 * 128 : 2 * 2 * 128 + 512] *= 1e4  # of values
    state = model.init_state(1)
    steps = torch.stack([model.step(ids[:, t], state) for t in range(40)], 1)
    for found, logits in ((state, steps), ((out := model(ids)).state, out.logits)):
        assert logits.isfinite().all()
        for name in (n for n in found if n.endswith(("keys", "values"))):
            assert float(found[name].float().abs().max()) == 448, name


@pytest.mark.parametrize("weights", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("setting", ["bf16+bf16", "bf16+8bit"])
def test_the_doctor_covers_the_setting(weights, setting):
    model = hold(small(), weights).keep_state(setting)
    checks, _ = examine(model, tokens=60)
    assert all(c.passed for c in checks), checks
    cost = next(c for c in checks if c.name == "float64, state kept")
    assert cost.error > 0 and setting in cost.note and cost.bound >= 4 * cost.error


@pytest.mark.parametrize(("weights", "setting"), [("int8", "bf16+8bit"), ("int4", "bf16+bf16"), ("bf16", "bf16+8bit")])
def test_the_engine_is_invariant_with_them(weights, setting):
    model = hold(small(), weights).keep_state(setting)
    asked = [Request(tokens(n)[0].tolist(), 20, Sampling(0), logprobs=1) for n in (5, 33, 18)]

    def answers(together: bool) -> list:
        engine, found = Engine(model, slots=4, chunk=16, invariant=True), [[] for _ in asked]
        for request, events in zip(asked, found, strict=True):
            engine.submit(request, events.append)
            while engine.busy and not together:
                engine.step()
        while engine.busy:
            engine.step()
        return [[(e.token, e.logprob) for e in events if e.token is not None] for events in found]

    assert answers(True) == answers(False)


def test_a_start_kept_otherwise_is_refused():
    model = hold(small(), "bf16")
    engine, kept = Engine(model, slots=1), []
    engine.submit(Request([1, 2, 3], 1, Sampling(0), keep=True), kept.append)
    while engine.busy:
        engine.step()
    narrow = Engine(copy.deepcopy(model).keep_state("bf16+8bit"), slots=1)
    with pytest.raises(
        ValueError, match=r"start: layers.0.fast_weights is torch.float32, the model keeps torch.bfloat16"
    ):
        narrow.submit(Request([4], 1, start=kept[-1].final), kept.append)
