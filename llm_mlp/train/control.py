"""Adaptive training: controllers observe each step's metrics and return actions; the loop applies them.

A controller changes nothing itself. What it has seen is in its ``state_dict`` (plain numbers, part of the checkpoint),
so that a resumed run decides what the uninterrupted one would have decided. Every action is logged with its reason and
written to ``actions.jsonl``. The rules, with their constants, are in docs/training.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median, stdev
from typing import Any, Protocol

from llm_mlp.config import ControlConfig


@dataclass(frozen=True)
class Metrics:
    """What a step came to, the same on every process."""

    step: int  # from 1
    loss: float  # nats a token, mean of the batch
    grad_norm: float  # of the batch's mean gradient, before clipping
    batch_size: int
    warm: bool = True  # whether the schedule's warm-up is over
    momentum_norm: float | None = None  # of the optimizers' running mean of the clipped gradients, before this step
    clipped_norm: float | None = None  # of the gradient after clipping
    micro_norm_squared: float | None = None  # mean over parts of a batch of the squared norm of a part's mean gradient
    micro_size: int | None = None  # samples of such a part


@dataclass(frozen=True)
class Action:
    """A change that a controller asks for. ``what``: gradient_factor, loss_factor, batch_size, advice, micro_batch."""

    step: int
    controller: str
    what: str
    value: float
    reason: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Controller(Protocol):
    name: str

    def observe(self, m: Metrics) -> list[Action]:
        """The actions that this step calls for, most often none."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class _Remembers:
    """State in plain attributes named by ``kept``."""

    kept: tuple[str, ...] = ()

    def state_dict(self) -> dict[str, Any]:
        return {name: list(v) if isinstance(v := getattr(self, name), list) else v for name in self.kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.kept:
            setattr(self, name, state[name])


def _stand_out(window: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation of a window, the latter at least a thousandth of the mean."""
    mean = fmean(window)
    return mean, max(stdev(window), 1e-3 * abs(mean))


class GradientNoise(_Remembers):
    """The rate from the gradient's signal-to-noise ratio over time.

    With a momentum m of decay b, E|g|^2 = signal + noise and E|m|^2 = signal + c noise, c = (1 - b) / (1 + b), so the
    noise is (|g|^2 - |m|^2) / (1 - c), where m, a mean of clipped gradients, is divided by the same mean of what was
    left of them. The median noise of the last 5 steps is held against its long geometric mean
    (100 steps): the signal is the same in both, so this is how the signal-to-noise ratio has changed. Above ``START``
    times, the factor is the root of the ratio's inverse (a power of two, as the error of a step grows with rate^2
    times noise); below ``END`` times it is 1 again.
    """

    START, END, SHORT, LONG, SETTLE = 4.0, 2.0, 5, 100, 50
    FLOOR = 0.1  # share of |g|^2 below which noise does not matter and is hard to tell
    name = "gradient_noise"
    kept = ("recent", "log_mean", "count", "factor", "left")

    def __init__(self, momentum: float, min_factor: float) -> None:
        self.momentum = momentum
        self.share = (1 - momentum) / (1 + momentum)
        self.min_factor = min_factor
        self.recent: list[float] = []
        self.log_mean = 0.0
        self.count = 0
        self.factor = 1.0
        self.left = 0.0  # mean of clipped over whole gradients, with the momentum's decay and start

    def observe(self, m: Metrics) -> list[Action]:
        if m.clipped_norm is None or not math.isfinite(m.grad_norm) or not m.grad_norm:
            return []
        left, now = self.left, m.clipped_norm / m.grad_norm
        self.left = self.momentum * left + (1 - self.momentum) * now
        if m.momentum_norm is None or not left or not m.warm:
            return []
        squares = m.grad_norm**2
        noise = (squares - (m.momentum_norm / left) ** 2) / (1 - self.share)
        noise = min(max(noise, self.FLOOR * squares), squares)
        self.recent = [*self.recent, noise][-self.SHORT :]
        ratio = median(self.recent) / math.exp(self.log_mean) if self.count else 1.0
        found = self._decide(m.step, ratio) if self.count >= self.SETTLE else []
        self.count += 1
        # A tenth of a step's surprise at most: what stands out should not become the measure it is held against.
        surprise = math.log(noise) - self.log_mean if self.count > 1 else 0.0
        if self.count == 1:
            self.log_mean = math.log(noise)
        limit = math.log(self.START) if self.count > self.SETTLE else math.inf
        self.log_mean += max(-limit, min(limit, surprise)) / min(self.count, self.LONG)
        return found

    def _decide(self, step: int, ratio: float) -> list[Action]:
        wanted = self.factor
        if ratio >= self.START:
            wanted = max(self.min_factor, min(self.factor, 2.0 ** -round(math.log2(ratio) / 2)))
        elif ratio < self.END:
            wanted = 1.0
        if wanted == self.factor:
            return []
        self.factor = wanted
        why = f"gradient noise is {ratio:.3g} times its long mean"
        return [Action(step, self.name, "gradient_factor", wanted, why)]


class LossWatch(_Remembers):
    """The rate from the loss: a spike, a divergence, a plateau.

    Spike: ``sigma`` standard deviations above the mean of the last 50 losses; the factor halves and comes back after
    patience / 10 steps without one. Divergence: the mean of the last 20 losses is 5 % and 3 deviations above the lowest
    such mean, for 20 steps; the factor halves, again after each further 50 such steps, and stays. Plateau: with 95 %
    confidence the last ``patience`` losses are less than 0.2 % below the ``patience`` before them; the factor halves
    and stays, and two new windows are awaited.
    """

    SHORT, WINDOW, ENOUGH = 20, 50, 30
    name = "loss_watch"
    kept = ("losses", "lowest", "above", "calm", "dips", "lasting", "plateau")

    def __init__(self, sigma: float, patience: int) -> None:
        self.sigma, self.patience = sigma, patience
        self.losses: list[float] = []  # the last WINDOW without spikes
        self.plateau: list[float] = []  # the last 2 * patience
        self.lowest = math.inf  # mean of SHORT losses
        self.above = 0  # steps that the mean has been far above it
        self.calm = 0  # steps since the last spike
        self.dips = 0  # halvings that will be undone
        self.lasting = 0  # those that stay

    @property
    def factor(self) -> float:
        return 0.5 ** (self.dips + self.lasting)

    def observe(self, m: Metrics) -> list[Action]:
        if not math.isfinite(m.loss):
            return []
        found = []
        spike = False
        if len(self.losses) >= self.ENOUGH and m.warm:
            mean, deviation = _stand_out(self.losses)
            spike = m.loss > mean + self.sigma * deviation
            if spike and (self.calm > 0 or not self.dips):
                self.dips += 1
                found.append(self._action(m.step, f"loss {m.loss:.4g} against {mean:.4g} +- {deviation:.2g}: a spike"))
        self.calm = 0 if spike else self.calm + 1
        if self.dips and self.calm >= max(1, self.patience // 10):
            self.dips -= 1
            self.calm = 0
            found.append(self._action(m.step, f"no spike in {max(1, self.patience // 10)} steps"))
        # A level that lasts is no spike: after SHORT steps above it, the window takes the new level in.
        if not spike or self.above >= self.SHORT:
            self.losses = [*self.losses, m.loss][-self.WINDOW :]
        self.plateau = [*self.plateau, m.loss][-2 * self.patience :]
        if m.warm:
            found += self._divergence(m.step) + self._plateau(m.step)
        return found

    def _divergence(self, step: int) -> list[Action]:
        if len(self.plateau) < self.ENOUGH:
            return []
        now = fmean(self.plateau[-self.SHORT :])
        self.lowest = min(self.lowest, now)
        deviation = _stand_out(self.plateau[-self.SHORT :])[1]
        # A single high loss lifts a mean of 20 by its 20th part and their deviation by more: it is no divergence.
        far = now > max(1.05 * self.lowest, self.lowest + 3 * deviation / math.sqrt(self.SHORT))
        far = far and median(self.plateau[-self.SHORT :]) > 1.05 * self.lowest
        self.above = self.above + 1 if far else 0
        if self.above == 0 or self.above < self.SHORT or (self.above - self.SHORT) % self.WINDOW:
            return []
        self.lasting += 1
        return [self._action(step, f"mean loss {now:.4g} against {self.lowest:.4g} at its lowest: a divergence")]

    def _plateau(self, step: int) -> list[Action]:
        n = self.patience
        if len(self.plateau) < 2 * n:
            return []
        before, after = self.plateau[:n], self.plateau[n:]
        gain = fmean(before) - fmean(after)
        error = math.sqrt((stdev(before) ** 2 + stdev(after) ** 2) / n)
        if gain + 2 * error >= 0.002 * abs(fmean(before)):
            return []
        self.plateau = []
        self.lasting += 1
        return [self._action(step, f"{gain:.2g} +- {error:.1g} gained in {n} steps: a plateau")]

    def _action(self, step: int, why: str) -> Action:
        return Action(step, self.name, "loss_factor", self.factor, why)


class BatchNoise(_Remembers):
    """The batch size from the gradient noise scale (arXiv 1812.06162, appendix A.1).

    From the squared norms of the mean gradient over b and over B samples: signal = (B|G_B|^2 - b|G_b|^2) / (B - b),
    noise = (|G_b|^2 - |G_B|^2) / (1/b - 1/B), both smoothed over 50 steps before their ratio, the noise scale in
    samples, is taken. At this batch size a step is worth half of one with the true gradient. When it has been above
    twice the batch for 50 steps: advice (once for each doubling), or a batch doubled up to ``limit``.
    """

    SMOOTH, STEADY = 50, 50
    name = "batch_noise"
    kept = ("signal", "noise", "count", "steady", "advised")

    def __init__(self, mode: str, limit: int) -> None:
        self.mode, self.limit = mode, limit
        self.signal = self.noise = 0.0
        self.count = self.steady = self.advised = 0

    @property
    def scale(self) -> float | None:
        """The noise scale in samples; None until it can be told (two parts of a batch, a signal above the noise)."""
        return (
            self.noise / self.signal if self.count >= self.SMOOTH // 2 and self.signal > 0 and self.noise > 0 else None
        )

    def observe(self, m: Metrics) -> list[Action]:
        if (
            m.micro_norm_squared is None
            or m.micro_size is None
            or not math.isfinite(m.grad_norm + m.micro_norm_squared)
        ):
            return []
        small, big = m.micro_size, m.batch_size
        whole = m.grad_norm**2
        signal = (big * whole - small * m.micro_norm_squared) / (big - small)
        noise = (m.micro_norm_squared - whole) / (1 / small - 1 / big)
        self.count += 1
        share = 1 / min(self.count, self.SMOOTH)
        self.signal += share * (signal - self.signal)
        self.noise += share * (noise - self.noise)
        scale = self.scale
        self.steady = self.steady + 1 if m.warm and scale is not None and scale > 2 * m.batch_size else 0
        if self.steady < self.STEADY or scale is None:
            return []
        wanted = 2 * m.batch_size
        why = f"gradient noise scale {scale:,.0f} samples against a batch of {m.batch_size:,}"
        if self.mode == "ramp" and wanted <= self.limit:
            self.steady = 0
            return [Action(m.step, self.name, "batch_size", wanted, why)]
        if self.advised >= wanted:
            return []
        self.advised = wanted
        why += "" if self.mode == "advice" else f"; control.max_batch = {self.limit:,} is reached"
        return [Action(m.step, self.name, "advice", wanted, f"{why}: batch_size = {wanted:,} would use fewer steps")]


class Guard(_Remembers):
    """Says whether a step may be applied, before it is: NaN and infinity always, spikes on request.

    A spike is a loss or a gradient norm ``sigma`` standard deviations above the mean of the last 100 applied steps (the
    norm in logarithms), and a loss 5 % or a norm three times above it. After 20 refused steps in a row the last one is
    let through: what lasts is no spike.
    """

    WINDOW, ENOUGH, LIMIT = 100, 30, 20
    name = "guard"
    kept = ("losses", "norms", "refused")

    def __init__(self, spikes: bool, sigma: float) -> None:
        self.spikes, self.sigma = spikes, sigma
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.refused = 0  # in a row

    def objection(self, m: Metrics) -> str | None:
        """Why the step should not be applied; None if it may be."""
        if not math.isfinite(m.loss) or not math.isfinite(m.grad_norm):
            self.refused += 1
            return "not finite"
        norm = math.log(max(m.grad_norm, 1e-30))
        why = self._spike(m.loss, norm) if self.spikes and m.warm and len(self.losses) >= self.ENOUGH else None
        if why and self.refused + 1 < self.LIMIT:
            self.refused += 1
            return why
        self.refused = 0
        self.losses = [*self.losses, m.loss][-self.WINDOW :]
        self.norms = [*self.norms, norm][-self.WINDOW :]
        return None

    def _spike(self, loss: float, norm: float) -> str | None:
        mean, deviation = _stand_out(self.losses)
        if loss > max(mean + self.sigma * deviation, 1.05 * mean):
            return f"a spike: mean loss so far {mean:.4g} +- {deviation:.2g}"
        mean, deviation = _stand_out(self.norms)
        if norm > mean + max(self.sigma * deviation, math.log(3)):
            return f"a spike: gradient norm so far {math.exp(mean):.4g}"
        return None


class Replay:
    """Actions taken from a record instead of being decided: what a run did once it does again, whatever it runs on."""

    def __init__(self, recorded: Iterable[dict[str, Any]]) -> None:
        self._actions: dict[int, list[Action]] = {}
        for line in recorded:
            self._actions.setdefault(line["step"], []).append(Action(**line))
        self.until = max(self._actions, default=0)

    def at(self, step: int) -> list[Action]:
        return self._actions.get(step, [])


def make_controllers(config: ControlConfig, *, momentum: float, batch_size: int) -> list[Controller]:
    """The controllers that a config asks for."""
    found: list[Controller] = []
    if config.rate_from_gradients:
        found.append(GradientNoise(momentum, config.min_factor))
    if config.rate_from_loss:
        found.append(LossWatch(config.spike_sigma, config.patience))
    if config.batch != "off":
        found.append(BatchNoise(config.batch, config.max_batch or 8 * batch_size))
    return found
