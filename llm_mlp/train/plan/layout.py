"""How a run may be spread over GPUs, and what each way costs: memory of a process, bytes it sends, seconds a step.

Fully sharded data parallelism, context parallelism and tensor parallelism within a node are the engine's own
(`llm_mlp.train.parallel`, `.context`, `.tensor`); a pipeline is taken to run one forward and one backward pass in turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property

from llm_mlp.config import ModelConfig, ModulePrecisionConfig
from llm_mlp.models import model_cost
from llm_mlp.models.lm import Checkpointing
from llm_mlp.models.routing import Routing
from llm_mlp.train.optim import AT_ONCE, NEWTON_SCHULZ_STEPS
from llm_mlp.train.pipeline import layers_of
from llm_mlp.train.plan.figures import COPY, GPU, H100_PEAK, LINK_SHARE, PRODUCT, USABLE, WORKSPACE, PlanError
from llm_mlp.train.plan.figures import rate as measured_rate
from llm_mlp.train.plan.trace import SAME, Weight, block_trace, loss_trace, step_bytes, weights_of
from llm_mlp.train.tensor import part_config

MODES: tuple[Checkpointing, ...] = ("none", "selective", "full")
# Bytes that a step moves for each number: what AdamW's fused kernel reads and writes; in 8 bits the passes around it.
STEP_TRAFFIC = {("muon", "same"): 28, ("adamw", "same"): 28, ("muon", "8bit"): 80, ("adamw", "8bit"): 148}
SELECTIVE_COST = 1.05  # assumed: what computing all but the costly products again takes


@dataclass(frozen=True)
class Layout:
    """``fsdp`` readers of different samples, ``pp`` stages, ``cp`` spans of a sequence, ``tp`` parts of a layer.

    ``zero``: 0 keeps everything on every process (DDP), 1 to 3 shard over fsdp x cp processes as
    `ParallelConfig.zero`. ``micro``: sequences a forward pass.
    """

    fsdp: int
    pp: int
    cp: int
    tp: int
    zero: int
    micro: int
    checkpointing: Checkpointing

    @property
    def gpus(self) -> int:
        return self.fsdp * self.pp * self.cp * self.tp

    @property
    def shards(self) -> int:
        return self.fsdp * self.cp

    def __str__(self) -> str:
        return ",".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self))


@dataclass(frozen=True)
class Stage:
    """What one process of a pipeline stage and a tensor part holds, before it is sharded."""

    config: ModelConfig
    layers: range  # by their numbers in `config`
    weights: tuple[tuple[Weight, int], ...]  # and how often each is there

    def numbers(self, shards: int = 1, root: bool | None = None) -> int:
        """Of parameters; ``root``: of the embedding and the head alone, or of the layers alone."""
        return sum(n * w.local(shards) for w, n in self.weights if root is None or root == (w.layer < 0))

    @cached_property
    def largest_block(self) -> int:
        layers = {w.layer for w, _ in self.weights if w.layer >= 0}
        return max(sum(w.numbers for w, _ in self.weights if w.layer == layer) for layer in layers)


@dataclass(frozen=True)
class Memory:
    """Bytes of the process that holds most."""

    weights: int
    gradients: int
    optimizer: int
    activations: int  # kept for the backward passes under way, at most
    working: int  # at the peak: what exists for a moment, gathered weights, the loss
    peak: int  # not the sum of the parts: they are not all there at one moment
    when: str  # the moment of the peak


@dataclass(frozen=True)
class Time:
    """Of a step; bytes and seconds of the process that does most."""

    links: dict[str, tuple[int, str]]  # bytes sent for each purpose, and over which link
    compute: float
    exposed: float  # exchanges that nothing hides
    optimizer: float
    bubble: float  # share of the pipeline's time
    step: float


class Job:
    """A run to be planned: ``batch`` sequences of ``length`` tokens a step on ``gpus`` devices.

    ``optimizer``, ``state``: as `OptimizerConfig.name` and `OptimizerConfig.state`. ``modules``: as
    `TrainConfig.module_precision`; it changes what layers keep, not the time that is reckoned.
    """

    def __init__(
        self,
        config: ModelConfig,
        gpu: GPU,
        gpus: int,
        length: int,
        batch: int,
        optimizer: str,
        state: str = "same",
        modules: ModulePrecisionConfig = SAME,
    ) -> None:
        self.modules = modules
        self.config, self.gpu, self.gpus, self.length, self.batch = config, gpu, gpus, length, batch
        self.optimizer, self.state = optimizer, state
        self.on_gpu = gpu.name != "cpu"
        self.rate, self.rate_source = measured_rate(gpu, config, length)
        self.share = gpu.peak / H100_PEAK  # of the H100 that products and copies were measured on
        cost = model_cost(config, context=length)
        self.head_flops = 2 * config.d_model * config.vocab_size
        self.layer_flops = (cost.flops - self.head_flops) / config.n_layers  # forward, a token
        self.parameters = cost.parameters
        self._stages: dict[tuple[int, int], Stage] = {}

    # -- which layouts there are -----------------------------------------------------------------------------------

    def layouts(self, checkpointing: tuple[Checkpointing, ...], wanted: dict[str, int]) -> Iterator[Layout]:
        """All that the model, the batch and the node allow; ``wanted`` fixes some of their numbers."""
        for tp in _divisors(self.gpus):
            for pp in _divisors(self.gpus // tp):
                for cp in _divisors(self.gpus // tp // pp):
                    fsdp = self.gpus // tp // pp // cp
                    if self.refusal(fsdp, pp, cp, tp):
                        continue
                    for micro in _divisors(self.batch // fsdp):
                        for zero in (0, 1, 2, 3) if fsdp * cp > 1 else (0,):
                            for mode in checkpointing:
                                found = Layout(fsdp, pp, cp, tp, zero, micro, mode)
                                if all(getattr(found, name) == n for name, n in wanted.items()):
                                    yield found

    def refusal(self, fsdp: int, pp: int, cp: int, tp: int) -> str | None:
        """Why the model or the batch cannot be cut so; None if it can."""
        c, attention = self.config, "attention" in self.config.mixers
        if tp > self.gpu.node:
            return f"tp = {tp} leaves the {self.gpu.node} GPUs of a node"
        if tp > 1 and self.state == "8bit":
            return f"tp = {tp} would cut through blocks of optimizer state that share a scale"
        if why := c.not_shared_by(tp):
            return f"tp = {tp} {why}"
        if pp > c.n_layers:
            return f"pp = {pp} is more than the {c.n_layers} layers"
        if cp > 1 and attention:
            return f"cp = {cp}: attention layers are not split along the sequence"
        least = max(c.perception.block, 256)
        if self.length % cp or (cp > 1 and self.length // cp < least):
            return f"cp = {cp} does not cut {self.length:,} tokens into equal spans of at least {least}"
        if self.batch % fsdp:
            return f"fsdp = {fsdp} readers do not divide a batch of {self.batch} sequences"
        return None

    def stage(self, layout: Layout) -> Stage:
        """The stage with most layers (with routing: the last), and the embedding and the head (of a pipeline: one of
        them)."""
        key = layout.pp, layout.tp
        if key not in self._stages:
            c, tp = self.config, layout.tp
            number = -(-c.n_layers // layout.pp)
            if tp > 1:
                c = part_config(c, tp)
            own = c.model_copy(update={"tie_embeddings": c.tie_embeddings or layout.pp > 1})
            if c.routing.last_layers:
                layers = range(c.n_layers - number, c.n_layers)
                weights = tuple((w, 1) for w in weights_of(own, self.optimizer, self.state, layers))
            else:
                # One layer of each kind is built, and counted as often as it is there.
                own, layers = own.model_copy(update={"n_layers": number}), range(number)
                kinds = range(min(number, len(c.pattern)))
                built = weights_of(own.model_copy(update={"n_layers": len(kinds)}), self.optimizer, self.state)
                counts = [sum(1 for i in layers if i % len(kinds) == kind) for kind in kinds]
                weights = tuple((w, counts[w.layer] if w.layer >= 0 else 1) for w in built)
            self._stages[key] = Stage(own, layers, weights)
        return self._stages[key]

    def entering(self, layout: Layout, stage: int) -> int:
        """Tensors of the residual stream's size that enter a stage: itself and, where later layers route, the inputs of
        all layers before."""
        before = layers_of(stage, layout.pp, self.config.n_layers).start
        return 1 + (before if self.config.routing.last_layers else 0)

    def parts(self, layout: Layout) -> int:
        """Micro-batches a step of a process."""
        return self.batch // layout.fsdp // layout.micro

    # -- memory ----------------------------------------------------------------------------------------------------

    def memory(self, layout: Layout) -> Memory:
        """Of the process that holds most, of an eager run; the moments that may be the peak are compared."""
        stage, parts = self.stage(layout), self.parts(layout)
        own, span, c = stage.config, self.length // layout.cp, stage.config
        shards = layout.shards if layout.zero else 1
        root = 4 * stage.numbers(root=True)
        weights = gradients = 4 * stage.numbers(shards)
        state = sum(n * w.state_bytes(shards) for w, n in stage.weights)
        gathered = self._gathered(layout)
        kinds = [i if Routing.routed(c, i) else i % len(c.pattern) for i in stage.layers]
        mode: Checkpointing = "selective" if layout.checkpointing == "selective" else "none"
        traces = {i: block_trace(own, i, layout.micro, span, self.on_gpu, mode, self.modules) for i in set(kinds)}
        loss = loss_trace(own, layout.micro, span, self.on_gpu, self.modules)
        stream = 4 * layout.micro * span * c.d_model  # the residual stream, a layer's input
        crossed = layout.cp * sum(self.context_bytes(own, layout.micro)[0]) if layout.cp > 1 else 0
        kept = [traces[i].saved + crossed for i in kinds]
        full = layout.checkpointing == "full"
        saved = [stream + (0 if full else size) for size in kept]
        every = stream + sum(saved)  # and the embedding's output
        entering = [stream * (self.entering(layout, s) - 1) for s in range(layout.pp)]  # beside a layer's own input
        # Of the stage that keeps most: the first has most micro-batches under way, later ones are given more of each.
        flying = max(min(layout.pp - s, parts) * (every + more) for s, more in enumerate(entering))
        at_end = every + stream + entering[-1]  # of the last stage, whose only micro-batch reaches the loss
        # The states, which the caller has to the end of the forward pass. With "full" no layer saves a part of them.
        passing = sum(traces[i].whole_state if full else traces[i].state for i in kinds)
        working = max(t.forward - t.saved for t in traces.values())  # of a layer, forward
        back = {
            kind: max(t.forward + stream, t.backward) + crossed if full else t.backward - t.saved
            for kind, t in traces.items()
        }
        before = gradients if parts > 1 else 0  # from earlier micro-batches
        head = root // 2 // shards  # the head's gradients come first, the embedding's last
        others = gradients - head - 4 * stage.largest_block // shards
        # Of each moment: gradients that are there, what is kept for backward passes, and the rest.
        moments = {
            "the last layer's forward pass": (before, flying, passing + working),
            "the loss": (before, at_end, passing + loss.forward),
            "the loss's backward pass": (before, at_end, loss.backward),
            # From a stage behind come the gradients of all that went there.
            "the last layer's backward pass": (max(before, head), flying, max(back.values()) + entering[-1]),
            "the first layer's backward pass": (
                max(before, others),
                flying - every + stream + saved[0],
                max(back.values()),
            ),
        }
        if c.routing.last_layers and len(kinds) > 1:  # gradients wait for every layer whose input the last one read
            waiting = stream * stage.layers[-1]
            there = max(before, head + 4 * stage.largest_block // shards)
            moments["the backward pass of the last layer but one"] = (
                there,
                flying - saved[-1],
                back[kinds[-2]] + waiting,
            )
        moments = {name: (g, a, work + gathered) for name, (g, a, work) in moments.items()}
        if self.optimizer == "muon" or self.state == "8bit":
            held = own.model_copy(update={"n_layers": len(stage.layers)})
            work = step_bytes(held, self.optimizer, self.state, self.on_gpu)
            if (
                self.optimizer == "muon" and layout.zero
            ):  # whole changes beside whole updates, until every process takes its shard
                matrices = [(w, n) for w, n in stage.weights if w.matrices]
                largest = max((w.numbers for w, _ in matrices), default=0)
                work += 4 * min(sum(n * w.numbers for w, n in matrices), AT_ONCE + largest)
            moments["the optimizer's step"] = (gradients, 0, work)
        when = max(moments, key=lambda name: sum(moments[name]))
        there, activations, rest = moments[when]
        peak = weights + state + there + activations + rest + WORKSPACE
        return Memory(weights, gradients, state, flying, rest + WORKSPACE, peak, when)

    @staticmethod
    def context_bytes(config: ModelConfig, sequences: int) -> tuple[tuple[int, int, int], tuple[int, int]]:
        """Own tensors that a process of a split sequence gives the others in a layer: forward the convolution's tail,
        the map of its span and its rows with their scores; backward gradients of states, and (of all) of tails and rows
        together."""
        p = config.perception
        G, R, F, mV, K = p.groups, p.read_width, p.features, p.heads_per_group * p.value_width, p.conv_width
        tail = 2 * max(K - 1, 0) * (2 * G * R + G * mV)
        maps = 4 * G * (F * F + p.heads_per_group + F * mV)
        rows = (2 * p.block + p.slots) * G * (2 * (R + mV) + 4) if p.block else 0
        both = tail + rows - ((2 * p.block + p.slots) * G * 4 if p.block else 0)
        return (sequences * tail, sequences * maps, sequences * rows), (sequences * 4 * G * F * mV, sequences * both)

    # -- time ------------------------------------------------------------------------------------------------------

    def flops(self, layout: Layout) -> tuple[float, float, float]:
        """Of a step on all GPUs: the model's (forward, and twice that backward), those recomputed, the optimizer's."""
        tokens = self.batch * self.length
        layers = self.layer_flops * self.config.n_layers
        again = layers if layout.checkpointing == "full" else 0.0
        return 3 * tokens * (layers + self.head_flops), tokens * again, self.gpus * self.optimizer_flops(layout)

    def optimizer_flops(self, layout: Layout) -> float:
        """Of one process: Muon orthogonalises the whole matrices of its stage, whatever the number of shards."""
        if self.optimizer != "muon":
            return 0.0
        total = 0.0
        for w, n in self.stage(layout).weights:
            for sides in w.matrices:
                small, large = sorted(sides)
                total += n * NEWTON_SCHULZ_STEPS * (4 * small * small * large + 2 * small**3)
        return total

    def time(self, layout: Layout) -> Time:
        """A step: the micro-batches through the pipeline, the last exchange of gradients, the optimizer."""
        stage, parts, n = self.stage(layout), self.parts(layout), layout.shards
        own, full = stage.config, layout.checkpointing == "full"
        tokens = layout.micro * self.length // layout.cp
        number = len(stage.layers)
        layers, root = number * self.layer_flops / layout.tp, self.head_flops
        part = tokens * (3 * (layers + root) + (layers if full else 0)) / self.rate
        part *= SELECTIVE_COST if layout.checkpointing == "selective" else 1.0
        numbers = stage.numbers()
        around = (n - 1) / n
        if layout.zero == 0:
            once, each = 2 * 4 * numbers * around, 0.0
        else:
            reduce = 4 * numbers * around
            gather = 4 * numbers * around * (2 if layout.zero == 3 else 1)
            once, each = (reduce, gather) if layout.zero == 1 else (0.0, gather + reduce)
        muon = 0.0
        if self.optimizer == "muon" and layout.zero:
            muon = 4 * around * sum(c * w.numbers for w, c in stage.weights if w.matrices)
        stream = tokens * own.d_model
        tensor = number * (6 if full else 4) * 2 * (layout.tp - 1) / layout.tp * 2 * stream
        forward, backward = self.context_bytes(own, layout.micro)
        context = number * (layout.cp - 1) * ((2 if full else 1) * sum(forward) + sum(backward))
        crossing = [4 * stream * self.entering(layout, s) for s in range(1, layout.pp)]  # before each stage, one way
        # A process sends activations to the stage behind it and gradients to the one before.
        pipeline = max(back + on for back, on in zip([0, *crossing], [*crossing, 0], strict=True))
        where = {
            "tp": self._link(layout.tp),
            "cp": self._link(layout.tp * layout.cp),
            "fsdp": self._link(layout.tp * layout.cp * layout.fsdp),
            "pp": self._link(layout.gpus),
        }

        def seconds(name: str, size: float) -> float:
            return size / (LINK_SHARE * (self.gpu.nvlink if where[name] == "nvlink" else self.gpu.network))

        # Weights and gradients travel behind the computing of other layers; the rest is waited for.
        shown = seconds("tp", tensor) + seconds("cp", context) + seconds("pp", pipeline)
        shown += max(0.0, seconds("fsdp", each) - part)
        turns = parts + layout.pp - 1
        last = max(0.0, seconds("fsdp", once) - 2 / 3 * part)
        shard = stage.numbers(n if layout.zero else 1)
        optimizer = self.optimizer_flops(layout) / (PRODUCT * self.share)
        optimizer += STEP_TRAFFIC[self.optimizer, self.state] * shard / (COPY * self.share)
        optimizer += seconds("fsdp", muon)
        step = turns * (part + shown) + last + optimizer
        sent = {"fsdp": parts * each + once + muon, "pp": parts * pipeline, "cp": parts * context, "tp": parts * tensor}
        return Time(
            {name: (round(size), where[name]) for name, size in sent.items()},
            parts * part,
            parts * shown + last,
            optimizer,
            (layout.pp - 1) / turns,
            step,
        )

    def _link(self, reach: int) -> str:
        """What joins a group of processes that spans ``reach`` neighbours."""
        return "nvlink" if reach <= self.gpu.node else "network"

    # -- the choice ------------------------------------------------------------------------------------------------

    @property
    def usable(self) -> float:
        return USABLE * self.gpu.memory

    def choose(self, checkpointing: tuple[Checkpointing, ...], wanted: dict[str, int]) -> Layout:
        """The fastest layout that fits.

        Raises:
            PlanError: none is possible, or none fits; with what the nearest ones need.
        """
        found = sorted(self.layouts(checkpointing, wanted), key=lambda layout: self.time(layout).step)
        if not found:
            raise PlanError(self._impossible(wanted))
        needs: dict[Layout, int] = {}
        for layout in found:
            if self._least(layout) > self.usable:
                continue
            needs[layout] = self.memory(layout).peak
            if needs[layout] <= self.usable:
                return layout
        nearest = sorted(needs, key=needs.__getitem__)[:3] or sorted(found, key=self._least)[:3]
        sizes = [(layout, needs.get(layout) or self._least(layout)) for layout in nearest]
        words = "; ".join(f"{layout} needs {size / 1e9:,.0f} GB" for layout, size in sizes)
        raise PlanError(
            f"--gpus {self.gpus}: no layout fits the {self.usable / 1e9:.0f} GB of a GPU that a run may use. Nearest: "
            f"{words}. Take more --gpus, another --gpu, a shorter --seq, --checkpointing full, --optimizer adamw or "
            "--optimizer-state 8bit"
        )

    def _least(self, layout: Layout) -> int:
        """Less than the peak, without following a layer: what is held, gathered, and the inputs of the layers."""
        stage, shards = self.stage(layout), layout.shards if layout.zero else 1
        held = 4 * stage.numbers(shards) + sum(n * w.state_bytes(shards) for w, n in stage.weights)
        stream = 4 * layout.micro * self.length // layout.cp * self.config.d_model
        flights = min(layout.pp, self.parts(layout))
        return held + self._gathered(layout) + flights * stream * (len(stage.layers) + 1)

    def _gathered(self, layout: Layout) -> int:
        """What spreading the model adds while gradients are made: of fully_shard the gathered weights (ZeRO-3: of the
        layer at work and the next), a layer's gradients and their copy on the way; DDP's buckets."""
        stage = self.stage(layout)
        whole, block = 4 * stage.numbers(), 4 * stage.largest_block
        if layout.zero == 0:
            return whole if layout.shards > 1 else 0
        kept = whole if layout.zero == 1 and self.parts(layout) > 1 else 0  # gradients
        return kept + (4 * stage.numbers(root=True) + 2 * block if layout.zero == 3 else whole) + 2 * block

    def _impossible(self, wanted: dict[str, int]) -> str:
        asked = ",".join(f"{name}={n}" for name, n in wanted.items())
        if asked:
            numbers = {name: wanted.get(name, 1) for name in ("fsdp", "pp", "cp", "tp")}
            product = numbers["fsdp"] * numbers["pp"] * numbers["cp"] * numbers["tp"]
            if self.gpus % product:
                return f"--layout {asked}: {product} processes do not divide --gpus {self.gpus}"
            if "fsdp" not in wanted:
                numbers["fsdp"] = self.gpus // product
            why = self.refusal(**numbers) or f"micro and zero have to suit {self.batch} sequences a step"
            return f"--layout {asked}: {why}"
        return (
            f"--gpus {self.gpus} cannot share {self.batch} sequences a step of {self.length:,} tokens; raise --batch "
            f"to a multiple of {self.gpus * self.length:,} tokens"
        )

    def neighbours(self, chosen: Layout, checkpointing: tuple[Checkpointing, ...]) -> Iterator[Layout | str]:
        """Layouts a step away from the chosen one: a factor of two moved, another ZeRO, micro-batch or checkpointing.
        Text: one that cannot be, and why."""
        c = chosen
        for a in ("fsdp", "pp", "cp", "tp"):
            for b in ("fsdp", "pp", "cp", "tp"):
                if a == b or getattr(c, a) % 2:
                    continue
                n = {name: getattr(c, name) for name in ("fsdp", "pp", "cp", "tp")}
                n[a], n[b] = n[a] // 2, n[b] * 2
                if why := self.refusal(**n):
                    yield f"{','.join(f'{k}={v}' for k, v in n.items())}: {why}"
                    continue
                micro = min(c.micro, self.batch // n["fsdp"])
                zero = c.zero if n["fsdp"] * n["cp"] > 1 else 0
                yield Layout(**n, zero=zero, micro=micro, checkpointing=c.checkpointing)
        for zero in range(4) if c.shards > 1 else ():
            if zero != c.zero:
                yield Layout(c.fsdp, c.pp, c.cp, c.tp, zero, c.micro, c.checkpointing)
        if self.batch // c.fsdp % (2 * c.micro) == 0:
            yield Layout(c.fsdp, c.pp, c.cp, c.tp, c.zero, 2 * c.micro, c.checkpointing)
        for mode in checkpointing:
            if mode != c.checkpointing:
                yield Layout(c.fsdp, c.pp, c.cp, c.tp, c.zero, c.micro, mode)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
