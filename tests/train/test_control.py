"""Controllers: what provokes each action, that calm provokes none, and that a run applies, keeps and repeats them."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from train_cases import records, run, tiny

from llm_mlp.checkpoint import save_model
from llm_mlp.config import ConfigError, ControlConfig
from llm_mlp.data import Loader, prepare
from llm_mlp.models import build_model
from llm_mlp.train import TrainingError
from llm_mlp.train.console import read_lines, read_metrics
from llm_mlp.train.control import BatchNoise, GradientNoise, Guard, LossWatch, Metrics, Replay
from llm_mlp.train.gradients import Gradients
from llm_mlp.train.optim import clip_limit, make_optimizers
from llm_mlp.train.schedule import decay_factor, momentum_at, rate_factor


def observed(controller, metrics) -> list:
    return [(a.step, a.what, a.value) for m in metrics for a in controller.observe(m)]


def gradients(noise, steps: int, momentum: float = 0.95, seed: int = 0):
    """Metrics of gradients of 4,000 numbers: a signal of norm 1 that stays, noise of norm ``noise(step)``."""
    draw = np.random.default_rng(seed)
    signal = np.full(4000, 1 / math.sqrt(4000))
    mean = np.zeros(4000)
    for step in range(1, steps + 1):
        g = signal + draw.normal(0, noise(step) / math.sqrt(4000), 4000)
        norm = float(np.linalg.norm(g))
        clipped = min(norm, 1.0)
        yield Metrics(step, 3.0, norm, 8, momentum_norm=float(np.linalg.norm(mean)), clipped_norm=clipped)
        mean += (1 - momentum) * (g * clipped / norm - mean)


def losses(loss, steps: int, seed: int = 0):
    """Metrics of a loss with a noise of 0.02."""
    draw = np.random.default_rng(seed)
    for step in range(1, steps + 1):
        yield Metrics(step, loss(step) + float(draw.normal(0, 0.02)), 1.0, 8)


@pytest.mark.parametrize("noise", [0.3, 2.0, 10.0])
def test_calm_gradients_provoke_nothing(noise):
    assert observed(GradientNoise(0.95, 0.1), gradients(lambda _: noise, 1000)) == []


@pytest.mark.parametrize("noise", [0.5, 2.0, 10.0])
@pytest.mark.parametrize(("times", "factor"), [(math.sqrt(10), 0.25), (10, 0.125)])
def test_noisier_gradients_lower_the_rate_and_calm_restores_it(noise, times, factor):
    """Ten times the noise's variance, and ten times its size, over a hundred steps."""
    found = observed(GradientNoise(0.95, 0.1), gradients(lambda step: noise * (times if 300 < step <= 400 else 1), 700))
    assert min(value for _, _, value in found) == factor
    assert 300 < found[0][0] <= 306 and 400 < found[-1][0] <= 410 and found[-1][1:] == ("gradient_factor", 1.0)


def test_the_gradient_factor_is_bounded():
    found = observed(GradientNoise(0.95, 0.3), gradients(lambda step: 100.0 if step > 100 else 1.0, 130))
    assert [value for _, _, value in found] == [0.5, 0.3] or [value for _, _, value in found] == [0.3]


def test_a_falling_loss_provokes_nothing():
    assert observed(LossWatch(6.0, 100), losses(lambda step: 10 * (step + 20) ** -0.3, 2000)) == []


def test_a_spike_halves_the_rate_for_a_while():
    found = observed(LossWatch(6.0, 100), losses(lambda s: 10 * (s + 20) ** -0.3 + (0.5 if s == 300 else 0), 600))
    assert found == [(300, "loss_factor", 0.5), (310, "loss_factor", 1.0)]


def test_a_plateau_halves_the_rate_for_good():
    found = observed(LossWatch(6.0, 100), losses(lambda s: max(10 * (s + 20) ** -0.3, 1.8), 1100))
    # The curve is flat from step 283.
    assert [what for _, what, _ in found] == ["loss_factor"] * len(found) and len(found) >= 2
    assert 350 < found[0][0] < 500 and [v for _, _, v in found] == [0.5**n for n in range(1, len(found) + 1)]


def test_a_divergence_halves_the_rate_for_good():
    found = observed(LossWatch(6.0, 200), losses(lambda s: 2.0 if s <= 150 else 2.0 + 0.01 * (s - 150), 230))
    lasting = [f for f in found if f[2] < 1]
    assert lasting and 170 <= lasting[0][0] <= 215


def noisy_batches(scale: float, batch: int, part: int, steps: int, seed: int = 0):
    """Norms of mean gradients of batches and their parts, where the noise scale is ``scale`` samples."""
    draw = np.random.default_rng(seed)
    size = 2000
    signal = np.full(size, 1 / math.sqrt(size))
    for step in range(1, steps + 1):
        parts = signal + draw.normal(0, math.sqrt(scale / part / size), (batch // part, size))
        whole = float(np.linalg.norm(parts.mean(0)))
        squares = float((parts**2).sum(1).mean())
        yield Metrics(step, 3.0, whole, batch, micro_norm_squared=squares, micro_size=part)


@pytest.mark.parametrize("scale", [4.0, 40.0, 400.0])
def test_the_noise_scale_is_found(scale):
    watch = BatchNoise("advice", 64)
    found = observed(watch, noisy_batches(scale, 32, 8, 200))
    assert watch.scale == pytest.approx(scale, rel=0.25)
    assert found == ([] if scale < 64 else [(found[0][0], "advice", 64)])


def test_without_parts_the_noise_scale_is_unavailable():
    watch = BatchNoise("advice", 64)
    assert observed(watch, losses(lambda _: 3.0, 100)) == [] and watch.scale is None


def test_a_ramp_doubles_up_to_its_limit():
    watch, size, found = BatchNoise("ramp", 32), 8, []
    draws = {n: iter(noisy_batches(1000.0, n, 4, 4000, seed=n)) for n in (8, 16, 32)}
    for _ in range(400):
        for action in watch.observe(next(draws[size])):
            found.append((action.what, action.value))
            size = int(action.value) if action.what == "batch_size" else size
    assert found == [("batch_size", 16), ("batch_size", 32), ("advice", 64)]


@pytest.mark.parametrize(
    ("controller", "metrics"),
    [
        (lambda: GradientNoise(0.95, 0.1), lambda: gradients(lambda s: 10.0 if 100 < s < 150 else 1.0, 200)),
        (lambda: LossWatch(6.0, 50), lambda: losses(lambda s: max(10 * (s + 20) ** -0.3, 2.5) + (s == 90), 300)),
        (lambda: BatchNoise("ramp", 64), lambda: noisy_batches(500.0, 16, 4, 200)),
    ],
)
def test_a_controller_goes_on_from_its_state(controller, metrics):
    """Also through JSON, as in a checkpoint."""
    import json

    whole, first, second = controller(), controller(), controller()
    every = list(metrics())
    wanted = observed(whole, every)
    cut = len(every) // 2 + 3
    found = observed(first, every[:cut])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert found + observed(second, every[cut:]) == wanted and wanted


def test_the_guard_refuses_spikes_and_lets_what_lasts_through():
    guard = Guard(spikes=True, sigma=6.0)
    calm = list(losses(lambda _: 3.0, 60))
    assert [guard.objection(m) for m in calm] == [None] * 60
    assert "a spike: mean loss" in str(guard.objection(Metrics(61, 4.0, 1.0, 8)))
    assert "a spike: gradient norm" in str(guard.objection(Metrics(62, 3.0, 50.0, 8)))
    assert guard.objection(Metrics(63, math.inf, 1.0, 8)) == "not finite"
    refused = [guard.objection(Metrics(64 + n, 4.0, 1.0, 8)) for n in range(17)]
    assert all(refused[:16]) and refused[16] is None  # the 20th in a row


def test_a_replay_acts_as_recorded():
    lines = [{"step": 5, "controller": "loss_watch", "what": "loss_factor", "value": 0.5, "reason": "a spike"}]
    replay = Replay(lines)
    assert replay.until == 5 and replay.at(4) == [] and replay.at(5)[0].value == 0.5


# -- in a run ------------------------------------------------------------------------------------------------------


def disturb(monkeypatch, noise) -> None:
    """Adds to the gradients of step s noise of ``noise(s)`` times their norm."""
    real = Gradients.of

    def of(self, first, batch_size, step):
        found = real(self, first, batch_size, step)
        draw = torch.Generator().manual_seed(step)
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
        count = sum(g.numel() for g in grads)
        for g in grads:
            g += torch.randn(g.shape, generator=draw) * (noise(step) * norm / math.sqrt(count))
        return found

    monkeypatch.setattr(Gradients, "of", of)


ADAPTIVE = ("control.rate_from_gradients=true", "control.rate_from_loss=true", "optimizer.lr=0.003", "log_every=1")


def test_a_calm_run_provokes_nothing(tmp_path, monkeypatch):
    disturb(monkeypatch, lambda step: 1.0)
    result = run(tmp_path, *ADAPTIVE, "steps=150")
    assert [a for a in result.actions if a.what != "advice"] == []


def test_noise_in_a_run_lowers_its_rate(tmp_path, monkeypatch, caplog):
    disturb(monkeypatch, lambda step: 10.0 if 110 < step <= 130 else 1.0)
    result = run(tmp_path, *ADAPTIVE, "steps=150", "schedule.kind=constant")
    first = next(a for a in result.actions if a.what == "gradient_factor")
    assert 110 < first.step <= 116 and first.value < 1
    rates = {line["step"]: line["lr"] for line in read_lines(tmp_path / "run/metrics.jsonl") if "lr" in line}
    assert rates[first.step] == 0.003 and rates[first.step + 1] == pytest.approx(0.003 * first.value)
    assert read_lines(tmp_path / "run/actions.jsonl")[0] == result.actions[0].as_dict()
    assert "gradient noise is" in caplog.text


def test_actions_of_a_resumed_run_are_those_of_the_uninterrupted_one(tmp_path, monkeypatch):
    disturb(monkeypatch, lambda step: 10.0 if 110 < step <= 130 else 1.0)
    options = (*ADAPTIVE, "steps=150", "checkpoint.every=60", "micro_batch=2")
    whole = run(tmp_path, *options, out="whole")
    first = run(tmp_path, *options, stop_after=115)
    second = run(tmp_path, *options, resume=True)
    assert first.curve + second.curve == whole.curve
    assert first.actions + second.actions == whole.actions and whole.actions
    assert [line["step"] for line in read_lines(tmp_path / "run/actions.jsonl")] == [a.step for a in whole.actions]


@pytest.mark.parametrize("source", ["documents", "records"])
def test_a_part_is_held_against_the_batch(tmp_path, source):
    """The estimates of signal and noise after a step, from gradients of mean losses that are made here."""
    more = records(tmp_path) if source == "records" else ()
    common = ("precision=fp64", "steps=1", "batch_size=6", *more)
    config = tiny(tmp_path, *common)
    model = build_model(config.model).double().randomize_()
    save_model(tmp_path / "start", model, prepare(config.data).tokenizer)
    run(tmp_path, *common, "micro_batch=2", init_from=tmp_path / "start")
    loader = Loader(prepare(config.data), config.data, batch_size=6, steps_hint=1)
    squares = []
    for samples in (2, 6):
        batch = loader.samples(0, samples)
        loss = model(batch.tokens, cu_seqlens=batch.cu_seqlens, targets=batch.targets).loss
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        squares.append(float(sum(g.square().sum() for g in gradients)))
    part, whole = squares
    folder = tmp_path / "run/checkpoints/step-0000001"
    found = json.loads((folder / "training.json").read_text())["controllers"]["batch_noise"]
    assert found["signal"] == pytest.approx((6 * whole - 2 * part) / 4, rel=1e-9)
    assert found["noise"] == pytest.approx((part - whole) / (1 / 2 - 1 / 6), rel=1e-9)


@pytest.mark.parametrize("control", ["advice", "ramp"])
def test_a_batch_in_a_single_part_has_no_noise_to_measure(tmp_path, caplog, control):
    caplog.set_level("INFO")
    why = "a process reads its share of the batch in a single part; set a smaller micro_batch"
    if control == "ramp":
        with pytest.raises(ConfigError, match=f"control.batch = ramp cannot measure the gradient noise: {why}"):
            run(tmp_path, "steps=2", "control.batch=ramp")
    else:
        run(tmp_path, "steps=2")
        assert f"gradient noise scale: unavailable ({why})" in caplog.text
        assert [line["noise_scale"] for line in read_metrics(tmp_path / "run") if "loss" in line] == [None] * 2


def scaled_loss(monkeypatch, factors: dict[int, float]) -> None:
    real, seen = Gradients._loss, [0]

    def loss(self, batch, carried):
        seen[0] += 1
        return real(self, batch, carried) * factors.get(seen[0], 1.0)

    monkeypatch.setattr(Gradients, "_loss", loss)


def test_a_spike_is_skipped_and_its_samples_are_listed(tmp_path, monkeypatch, caplog):
    scaled_loss(monkeypatch, {50: 20.0})
    run(tmp_path, "steps=55", "control.spikes=skip", "optimizer.lr=0.003")
    (line,) = read_lines(tmp_path / "run/quarantine.jsonl")
    assert (line["step"], line["first_sample"], line["last_sample"]) == (50, 196, 199)
    assert "a spike" in line["why"] and "step 50" in caplog.text


def test_a_run_of_nothing_but_nan_ends(tmp_path, monkeypatch):
    scaled_loss(monkeypatch, dict.fromkeys(range(1, 200), math.nan))
    monkeypatch.setattr("llm_mlp.train.loop.GIVE_UP", 5)
    with pytest.raises(TrainingError, match="The last 5 steps were all refused"):
        run(tmp_path, "steps=50", "on_nan=skip")


def test_the_ramp_changes_the_batch_and_the_schedule_goes_by_samples(tmp_path, monkeypatch):
    """The doubled batch takes twice the samples a step, so the run has fewer steps and ends at the same sample."""

    def observe(self, m):
        from llm_mlp.train.control import Action

        return [Action(m.step, "batch_noise", "batch_size", 8, "asked by the test")] if m.step == 3 else []

    monkeypatch.setattr(BatchNoise, "observe", observe)
    options = ("steps=9", "micro_batch=2", "control.batch=ramp", "control.max_batch=16", "schedule.kind=linear")
    result = run(tmp_path, *options)
    assert result.steps == 6 and result.tokens == 9 * 4 * 32
    lines = [line for line in read_lines(tmp_path / "run/metrics.jsonl") if "lr" in line]
    assert [line["batch_size"] for line in lines] == [4, 4, 4, 8, 8, 8]
    assert lines[-1]["sample"] == 36
    monkeypatch.undo()
    plain = run(tmp_path, "steps=9", "schedule.kind=linear", out="plain")
    assert plain.steps == 9
    other = [line["lr"] for line in read_lines(tmp_path / "plain/metrics.jsonl") if "lr" in line]
    assert [line["lr"] for line in lines] == pytest.approx([*other[:3], other[3], other[5], other[7]])


# -- memory --------------------------------------------------------------------------------------------------------


def too_large(monkeypatch, limit: int, from_step: int = 0) -> None:
    """More than ``limit`` sequences at once run out of memory, from a pass on."""
    real, seen = Gradients._loss, [0]

    def loss(self, batch, carried):
        seen[0] += 1
        if batch.tokens.numel() > limit * 32 and seen[0] > from_step:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nmore")
        return real(self, batch, carried)

    monkeypatch.setattr(Gradients, "_loss", loss)


@pytest.mark.parametrize("packing", ["joined", "streams"])
def test_out_of_memory_halves_the_part_and_repeats_the_step(tmp_path, monkeypatch, packing):
    options = ("batch_size=8", "optimizer.name=adamw", f"data.packing={packing}")
    wanted = run(tmp_path, *options, "micro_batch=2", out="wanted")
    too_large(monkeypatch, 2, from_step=2)
    result = run(tmp_path, *options)
    halved = [(a.step, a.what, a.value) for a in result.actions]
    assert halved == [(3, "micro_batch", 4), (3, "micro_batch", 2)]
    for (_, a), (_, b) in zip(result.curve, wanted.curve, strict=True):
        assert a == pytest.approx(b, abs=1e-4)


def test_a_single_sequence_that_does_not_fit(tmp_path, monkeypatch):
    too_large(monkeypatch, 0)
    with pytest.raises(TrainingError, match="a single sequence of 32 tokens does not fit"):
        run(tmp_path)


def test_the_largest_part_that_fits_is_found(tmp_path, monkeypatch):
    def probe(self, tokens, *args, **kwargs):
        if tokens.shape[0] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, tokens, *args, **kwargs)

    from llm_mlp.models import LM

    real = LM.forward
    monkeypatch.setattr(LM, "forward", probe)
    result = run(tmp_path, "micro_batch=auto", "batch_size=8", "steps=2")
    assert [a.value for a in result.actions if a.what == "micro_batch"] == [4, 2]


# -- averages, clipping, schedules ---------------------------------------------------------------------------------


def test_averages_are_what_their_names_say(tmp_path):
    from llm_mlp.checkpoint import load_model, read_tensors

    result = run(tmp_path, "steps=8", "average.ema=0.5", "average.last=3", "average.every=2", "checkpoint.every=1")
    points = [read_tensors(tmp_path / f"run/checkpoints/step-{n:07d}/model.safetensors") for n in range(1, 9)]
    ema = points[0]
    for n, point in enumerate(points[1:], 2):
        share = 1 - min(0.5, 1 - 1 / n)
        ema = {k: t + share * (point[k] - t) for k, t in ema.items()}
    found = {kind: read_tensors(tmp_path / f"run/model-{kind}/model.safetensors") for kind in ("ema", "mean")}
    for name, t in found["ema"].items():
        torch.testing.assert_close(t, ema[name])
        torch.testing.assert_close(found["mean"][name], sum(points[n][name] for n in (3, 5, 7)) / 3)
    assert set(result.averages) == {"ema", "mean"}
    line = read_lines(tmp_path / "run/metrics.jsonl")[-1]
    assert line["held_out_loss_ema"] == result.averages["ema"] != line["held_out_loss"]
    load_model(tmp_path / "run/model-ema")


def test_averages_go_on_after_a_resume(tmp_path):
    from llm_mlp.checkpoint import read_tensors

    options = ("average.ema=0.9", "average.last=2", "average.every=2")
    run(tmp_path, *options, out="whole")
    run(tmp_path, *options, stop_after=3)
    run(tmp_path, *options, resume=True)
    for kind in ("ema", "mean"):
        one, other = (read_tensors(tmp_path / name / f"model-{kind}/model.safetensors") for name in ("whole", "run"))
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_schedules_of_rate_decay_and_momentum():
    from llm_mlp.config import OptimizerConfig, ScheduleConfig

    linear = ScheduleConfig(kind="linear", warmup=0, decay=1.0)
    assert [rate_factor(linear, s, 4) for s in (0, 1, 1.5, 4)] == [1.0, 0.75, 0.625, 0.0]
    assert decay_factor(linear, 2, 4) == 1.0
    assert decay_factor(linear.model_copy(update={"weight_decay": "rate"}), 2, 4) == 0.5
    rising = ScheduleConfig(momentum_warmup=100)
    assert [momentum_at(rising, 0.95, s) for s in (0, 50, 100, 500)] == pytest.approx([0.85, 0.9, 0.95, 0.95])
    assert clip_limit(OptimizerConfig(clip=2.0), 10) == 2.0
    assert clip_limit(OptimizerConfig(clip_scale="size"), 400_000_000) == 2.0
    assert clip_limit(OptimizerConfig(clip=0.0), 10) == math.inf


def test_rates_reach_the_optimizers():
    from model_cases import SMALL

    from llm_mlp.config import ModelConfig, OptimizerConfig, build
    from llm_mlp.models import build_model
    from llm_mlp.train.optim import set_rates

    model = build_model(build(ModelConfig, {**SMALL, "d_model": 64, "attention": {"heads": 4, "head_dim": 16}}))
    muon, adamw = make_optimizers(model, OptimizerConfig(weight_decay=0.2))
    set_rates([muon, adamw], 0.01, 0.5, 0.9)
    assert muon.param_groups[0]["lr"] == 0.01 and muon.param_groups[0]["momentum"] == 0.9
    assert muon.param_groups[0]["weight_decay"] == 0.1 and adamw.param_groups[0]["weight_decay"] == 0.0


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["control.max_batch=6"], "control.max_batch = 6 is not a multiple of batch_size = 4"),
        (["control.batch=ramp", "data.packing=streams"], "control.batch = ramp changes the number of streams"),
        (["micro_batch=3"], "micro_batch = 3 does not divide batch_size = 4"),
        (["parallel.context=2"], "need several processes"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, overrides, says):
    with pytest.raises(ConfigError, match=says):
        run(tmp_path, *overrides)


def test_controls_are_off_but_advice():
    config = ControlConfig()
    assert not config.rate_from_gradients and not config.rate_from_loss and config.batch == "advice"
