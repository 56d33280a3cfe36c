"""One configuration system: frozen, validated models; YAML in and out; ``a.b=c`` overrides.

Every component owns a config class and every knob is a field of the component it belongs to.
pydantic does the type checking (strictly: ``"3"`` is not an integer); this module adds what it lacks:
YAML numbers such as ``4e-3``, dotted overrides, and a suggestion of the nearest name for a misspelt field.
"""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from llm_mlp.presets import preset

MixerName = Literal["perception", "attention"]


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the field and says what to do."""


class Config(BaseModel):
    """Base of every config: immutable, strict, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True, allow_inf_nan=False)


def _power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


class PerceptionConfig(Config):
    """A layer of perception heads. H = groups * heads_per_group heads write and read their own second layer."""

    groups: int = Field(4, ge=1, description="G: groups of heads; a group shares first layer, keys and erase")
    heads_per_group: int = Field(8, ge=1, description="m: heads in a group; each has its own time scale and values")
    read_width: int = Field(128, description="R: width of a group's read and key vectors")
    features: int = Field(
        128, description="F: hidden features of a head. F = R is the narrow form (no first layer), F > R learns one"
    )
    value_width: int = Field(16, description="V: output width of a head")
    conv_width: int = Field(4, ge=0, le=8, description="causal depthwise convolution over q, k, v; 0 switches it off")
    gate_rank: int = Field(64, ge=1, description="rank of the erase, write and output gates")
    erase: Literal["scalar", "diagonal", "free", "none"] = Field(
        "scalar",
        description="e = beta_t k (scalar), beta_t d*k with a learned fixed diagonal d <= 1, or beta free per token "
        "and feature (not contractive: hostile inputs can grow the state); none never erases",
    )
    erase_max: float = Field(1.98, gt=0, le=1.98, description="b_max; above 1.98 bf16 rounding alone can diverge")
    decay: bool = Field(True, description="context-aware forgetting; off: nothing is forgotten")
    half_life: tuple[float, float] = Field(
        (8.0, 4096.0), description="shortest and longest half-life (tokens) of a group's ladder in the first layer"
    )
    write_gate: bool = Field(True, description="context-aware gate on what is written")
    output_gate: bool = Field(True, description="context-aware gate on what is read")
    learned_slope: bool = Field(True, description="act(u) = u sigmoid(s u) with s learned; off: s = 1 (SiLU)")
    surprise: bool = Field(False, description="scale a head's output by 1 + gamma * surprise; off: no scaling")
    block: int = Field(256, ge=0, description="tokens of the open block that are kept exactly; 0 with slots 0: none")
    slots: int = Field(64, ge=0, description="earlier tokens kept exactly, the most surprising ones")
    read: Literal["relu2", "softmax"] = Field("relu2", description="how the memorised units are read")

    @property
    def heads(self) -> int:
        return self.groups * self.heads_per_group

    @property
    def value_channels(self) -> int:
        """Width of all heads' values together, G*m*V."""
        return self.heads * self.value_width

    @property
    def wide(self) -> bool:
        """Whether the heads have a learned first layer (F > R)."""
        return self.features != self.read_width

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not 1 <= self.heads <= 512:
            raise ValueError(
                f"groups * heads_per_group = {self.heads} perception heads; allowed are 1 to 512 (32-128 are usual)"
            )
        for name in ("read_width", "features", "value_width"):
            if not _power_of_two(getattr(self, name)):
                raise ValueError(f"{name} = {getattr(self, name)} is not a power of two")
        if self.features < self.read_width:
            raise ValueError(f"features = {self.features} must be at least read_width = {self.read_width}")
        if self.block == 0 and self.slots > 0:
            raise ValueError(f"slots = {self.slots} needs block > 0 (slots take in whole blocks); set slots: 0 too")
        if not 0 < self.half_life[0] <= self.half_life[1]:
            raise ValueError(f"half_life = {self.half_life} must be (shortest, longest), both positive")
        return self


class AttentionConfig(Config):
    """The baseline mixer: causal softmax attention with RoPE and QK-norm."""

    heads: int = Field(8, ge=1)
    head_dim: int = Field(64, ge=2)
    rope_theta: float = Field(10_000.0, gt=0)
    qk_norm: bool = True

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.heads > 512:
            raise ValueError(f"heads = {self.heads}; allowed are 1 to 512")
        if self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim} must be even (RoPE rotates pairs)")
        return self


class FFNConfig(Config):
    """Expanded dense layer."""

    hidden: int = Field(2048, ge=1, description="width of the hidden layer (3-4 times d_model is usual)")
    activation: Literal["relu2", "adaptive"] = Field(
        "relu2", description="adaptive: relu(u)^2 + tanh(c(x)) relu(-u)^2, c computed from the token"
    )
    adaptive_groups: int = Field(8, ge=1, description="groups of hidden channels that share one c(x)")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.activation == "adaptive" and self.hidden % self.adaptive_groups:
            raise ValueError(f"hidden = {self.hidden} is not a multiple of adaptive_groups = {self.adaptive_groups}")
        return self


class RoutingConfig(Config):
    """Per-token routing of earlier layers' outputs into the last layers (after MUDD, arXiv 2502.12170)."""

    last_layers: int = Field(0, ge=0, description="how many of the last layers read earlier outputs; 0: off")
    hidden: int = Field(32, ge=1, description="width of the routing MLP")


class ModelConfig(Config):
    """A language model: token embedding, n_layers blocks of (mixer, FFN), norm, head."""

    vocab_size: int = Field(8192, ge=2)
    d_model: int = Field(512, ge=8)
    n_layers: int = Field(8, ge=1)
    pattern: tuple[MixerName, ...] = Field(
        ("perception",), min_length=1, description="mixers of the layers, repeated; several kinds make a hybrid"
    )
    perception: PerceptionConfig = PerceptionConfig()
    attention: AttentionConfig = AttentionConfig()
    ffn: FFNConfig = FFNConfig()
    routing: RoutingConfig = RoutingConfig()
    dropout: float = Field(0.0, ge=0, lt=1, description="on mixer and FFN outputs; 0.1-0.2 for several epochs")
    logit_cap: float = Field(30.0, ge=0, description="logits are cap*tanh(logits/cap); 0: no cap")
    tie_embeddings: bool = Field(False, description="the head is the embedding, transposed")
    norm_eps: float = Field(1e-6, gt=0)

    def mixer(self, layer: int) -> MixerName:
        return self.pattern[layer % len(self.pattern)]

    @property
    def mixers(self) -> tuple[MixerName, ...]:
        """The mixer of each layer."""
        return tuple(self.mixer(i) for i in range(self.n_layers))

    def not_shared_by(self, processes: int) -> str | None:
        """Why each layer cannot be shared out to this many processes; None if it can."""
        if processes > 1 and "attention" in self.mixers:
            return "shares out layers by groups; this model has attention layers"
        if self.perception.groups % processes:
            return f"does not divide the model's perception.groups = {self.perception.groups}"
        if self.ffn.hidden % processes:
            return f"does not divide the model's ffn.hidden = {self.ffn.hidden}"
        if self.ffn.activation == "adaptive" and self.ffn.adaptive_groups % processes:
            return f"does not divide the model's ffn.adaptive_groups = {self.ffn.adaptive_groups}"
        return None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.routing.last_layers >= self.n_layers:
            raise ValueError(
                f"routing.last_layers = {self.routing.last_layers} must be below n_layers = {self.n_layers}"
            )
        if "attention" in self.mixers and self.attention.heads * self.attention.head_dim != self.d_model:
            raise ValueError(
                f"attention.heads * attention.head_dim = {self.attention.heads * self.attention.head_dim} "
                f"must equal d_model = {self.d_model}"
            )
        return self


class SourceConfig(Config):
    """One source of documents."""

    path: str = Field(min_length=1, description="file, folder, glob, or hf:NAME[:SPLIT] with the `hf` extra installed")
    weight: float = Field(1.0, gt=0, description="share of the samples, relative to the other sources")
    text_field: str = Field("text", description="field of JSON lines, Parquet and Hugging Face records")
    format: Literal["text", "instruct"] = Field(
        "text", description="instruct: records of a prompt and its completion, or chats; the loss is on the answers"
    )
    prompt_field: str = Field("prompt", description="instruct: field or TSV column of what is asked")
    completion_field: str = Field("completion", description="instruct: field or TSV column of what is answered")
    messages_field: str = Field(
        "messages", description="instruct: field of a chat, a list of {role, content}; a record with it is one"
    )
    columns: tuple[str, ...] = Field(
        (), description="instruct: names of a TSV's columns where its first row is a record already"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.columns and self.format != "instruct":
            raise ValueError("columns names the columns of instruction records; set format: instruct")
        if twice := sorted({name for name in self.columns if self.columns.count(name) > 1}):
            raise ValueError(f"columns names {twice[0]!r} twice")
        return self


class DataConfig(Config):
    """Where text comes from, how it is tokenised and packed."""

    sources: tuple[SourceConfig, ...] = Field((), description="empty: the sample text that ships with the package")
    prepared: str = Field(
        "", description="a folder that `llm-mlp prepare` wrote (here or on another machine); sources are not read"
    )
    tokenizer: str = Field(
        "bpe", description="bpe (trained on the sources), byte, a folder or tokenizer.json, or a tiktoken rank file"
    )
    vocab_size: int = Field(8192, ge=257, description="size of a BPE vocabulary that is trained here")
    tokenizer_sample_mb: float = Field(20.0, gt=0, description="MB of text a BPE vocabulary is trained on")
    held_out: float = Field(0.01, ge=0, lt=1, description="share of the documents held out, chosen by their hash")
    seq_len: int = Field(1024, ge=8, description="tokens a sample")
    packing: Literal["reset", "joined", "streams"] = Field(
        "joined",
        description="reset: state starts afresh at each document (cu_seqlens); joined: documents follow each other "
        "behind a separator; streams: long documents in order, state carried from step to step",
    )
    cache_dir: str = Field("data", min_length=1, description="folder for tokenised shards")
    seed: int = Field(0, ge=0, lt=2**63)
    chat_template: str = Field(
        "",
        description="a Jinja file; empty: the one in the folder of the tokenizer (or of --init-from), else, for "
        "instruction records, a plain one that ends each answer with the separator",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.tokenizer == "bpe" and self.vocab_size > 2**20:
            raise ValueError(f"vocab_size = {self.vocab_size} is too large")
        if self.packing != "reset" and any(source.format == "instruct" for source in self.sources):
            raise ValueError(
                f"packing = {self.packing} would let instruction records read each other; set packing: reset"
            )
        return self


class OptimizerConfig(Config):
    """Muon for matrices with AdamW for the rest, or AdamW alone."""

    name: Literal["muon", "adamw"] = "muon"
    lr: float = Field(4e-3, gt=0, description="peak rate (Muon updates are scaled to AdamW's root mean square)")
    matrix_rate: float = Field(1.0, gt=0, description="rate of the matrices in the blocks, as a factor of lr")
    embedding_rate: float = Field(
        1.0,
        gt=0,
        description="rate of the embedding (a tied head's too), as a factor of lr",
    )
    weight_decay: float = Field(0.1, ge=0, description="on matrices only")
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    momentum: float = Field(0.95, ge=0, lt=1, description="Muon's Nesterov momentum")
    state: Literal["same", "8bit"] = Field(
        "same", description="running means between steps: as the weights, or in 8 bits, a quarter of the memory"
    )
    clip: float = Field(1.0, ge=0, description="gradient norm is clipped at this; 0: no clipping")
    clip_scale: Literal["fixed", "size"] = Field(
        "fixed", description="size: clip is meant for 100 M parameters and grows as the root of their number"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas = {self.betas} must be at least 0 and below 1")
        return self


class ScheduleConfig(Config):
    """Learning rate over the run."""

    kind: Literal["cosine", "linear", "wsd", "constant"] = "linear"
    warmup: int = Field(2000, ge=0, description="steps of warm-up, at most a tenth of the run")
    decay: float = Field(0.6, gt=0, le=1, description="share of the run in which linear and wsd decay")
    final: float = Field(0.0, ge=0, le=1, description="rate at the end, relative to the peak")
    weight_decay: Literal["constant", "rate"] = Field(
        "constant", description="rate: the weight decay falls with the learning rate (whose product it is taken in)"
    )
    momentum_warmup: int = Field(0, ge=0, description="steps in which Muon's momentum rises from 0.85; 0: none")


class EvalConfig(Config):
    """Evaluation on the held-out documents during training."""

    every: int = Field(250, ge=0, description="steps between evaluations; 0: only at the end")
    tokens: int = Field(262_144, ge=1, description="held-out tokens an evaluation reads (at most)")


class CheckpointConfig(Config):
    every: int = Field(500, ge=0, description="steps between checkpoints; 0: only at the end")
    keep_last: int = Field(2, ge=1)
    keep_best: bool = Field(True, description="keep the checkpoint with the lowest held-out loss too")


class ControlConfig(Config):
    """Adaptive training: what may change while a run goes on (docs/training.md has the rules). All off but advice."""

    rate_from_gradients: bool = Field(False, description="lower the rate while gradients are noisier than they were")
    rate_from_loss: bool = Field(False, description="lower the rate on a spike, a divergence or a plateau of the loss")
    min_factor: float = Field(0.1, gt=0, le=1, description="the controllers together never go below this share")
    patience: int = Field(
        500, ge=20, description="steps in each half of what a plateau is judged by; a tenth of it: calm after a spike"
    )
    spikes: Literal["off", "skip"] = Field(
        "off", description="skip: a step whose loss or gradient norm stands out is not applied, its samples quarantined"
    )
    spike_sigma: float = Field(6.0, ge=3, description="standard deviations above the recent mean that stand out")
    batch: Literal["off", "advice", "ramp"] = Field(
        "advice", description="what the gradient noise scale does: nothing, a line in the log, a doubled batch"
    )
    max_batch: int = Field(0, ge=0, description="sequences a step that a ramp stops at; 0: eight times batch_size")


class AverageConfig(Config):
    """Averages of the weights, evaluated and exported beside the weights themselves."""

    ema: float = Field(0.0, ge=0, lt=1, description="decay of a moving average, for example 0.999; 0: none")
    last: int = Field(0, ge=0, description="mean of the weights at this many last points; 0: none")
    every: int = Field(50, ge=1, description="steps between the points of `last`")


class ParallelConfig(Config):
    """How a run is spread over the processes that torchrun starts; a single process needs none of it."""

    data: Literal["ddp", "fsdp"] = Field(
        "ddp", description="ddp: every process holds the whole model; fsdp: weights and optimizer state are sharded"
    )
    zero: int = Field(
        3,
        ge=1,
        le=3,
        description="fsdp: 1 keeps weights and accumulated gradients whole within a step, 2 the weights, 3 neither",
    )
    replicas: int = Field(1, ge=1, description="fsdp: copies of the sharded model (hybrid: shards within a node)")
    context: int = Field(1, ge=1, description="processes that share every sequence, each reading a span of it")
    pipeline: int = Field(
        1, ge=1, description="parts the layers are cut into, each on processes of its own; needs a micro_batch"
    )
    schedule: Literal["1f1b", "interleaved"] = Field(
        "1f1b", description="pipeline: one stage a process, or several (shorter waits, more is sent)"
    )
    stages_per_process: int = Field(2, ge=2, description="pipeline: stages of each process in schedule = interleaved")
    tensor: int = Field(1, ge=1, description="processes that share every layer, each computing some of its groups")
    compress: Literal["none", "bf16", "powersgd"] = Field("none", description="ddp: how gradients travel")
    powersgd_rank: int = Field(8, ge=1, description="4 sends half as much and costs 1 to 4 % of the loss early on")
    reduce_dtype: Literal["same", "bf16", "fp32"] = Field("same", description="fsdp: dtype gradients are summed in")
    timeout: float = Field(600.0, gt=0, description="seconds a process waits for the others")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.data == "fsdp" and self.compress != "none":
            raise ValueError(f"compress = {self.compress} needs data = ddp; with fsdp set reduce_dtype = bf16")
        if self.data == "ddp" and (self.replicas != 1 or self.zero != 3 or self.reduce_dtype != "same"):
            raise ValueError("zero, replicas and reduce_dtype are for data = fsdp")
        if self.pipeline == 1 and self.schedule != "1f1b":
            raise ValueError(f"schedule = {self.schedule} is for pipeline > 1")
        if self.schedule == "1f1b" and self.stages_per_process != 2:
            raise ValueError("stages_per_process is for schedule = interleaved")
        return self

    @property
    def stages(self) -> int:
        """Stages of the pipeline, over all processes."""
        return self.pipeline * (self.stages_per_process if self.schedule == "interleaved" else 1)


class ModulePrecisionConfig(Config):
    """Parts of the model that compute in another precision than the rest; same: as the run's ``precision`` says."""

    mixer: Literal["same", "fp32", "bf16"] = "same"
    ffn: Literal["same", "fp32", "bf16", "fp8"] = Field(
        "same",
        description="fp8: two of the three products of each FFN matrix in float8 (Hopper and later, precision bf16)",
    )
    head: Literal["same", "fp32", "bf16"] = Field("same", description="the last matrix, from which the loss is made")

    @property
    def autocast(self) -> dict[str, str]:
        """The parts whose products are cast otherwise than the rest's, and to what: fp32 or bf16."""
        found = {"mixer": self.mixer, "ffn": self.ffn, "head": self.head}
        return {part: name for part, name in found.items() if name in ("fp32", "bf16")}


class TrainConfig(Config):
    """A training run, in one process or many."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    evaluation: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    control: ControlConfig = ControlConfig()
    average: AverageConfig = AverageConfig()
    parallel: ParallelConfig = ParallelConfig()
    module_precision: ModulePrecisionConfig = ModulePrecisionConfig()
    out: str = Field("runs/train", min_length=1, description="folder of the run")
    steps: int = Field(1000, ge=1)
    batch_size: int = Field(64, ge=1, description="sequences an optimizer step")
    micro_batch: int | Literal["auto"] = Field(
        0,
        description="sequences a forward pass of a process; 0: all it has; auto: what fits in memory, found by trying",
    )
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = Field(
        "fp32", description="bf16 and fp16: mixed, by autocast; fp64: slow, to compare ways of training by"
    )
    compile: bool = Field(False, description="torch.compile every block")
    cuda_graph: bool = Field(
        False,
        description="forward and backward as one CUDA graph, which does not wait for Python (packing joined, not fp16)",
    )
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        "none",
        description="what the backward pass computes again: nothing, all but the costly products and ops, every block",
    )
    on_nan: Literal["stop", "skip"] = Field("stop", description="what a NaN or infinite loss or gradient does")
    deterministic: bool = Field(
        False, description="only deterministic algorithms, so that the same device gives the same bits (slower)"
    )
    debug_checks: bool = Field(False, description="check the ops' inputs for NaN and positive decays (slow)")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1 ...")
    seed: int = Field(0, ge=0, lt=2**63)
    log_every: int = Field(10, ge=1)
    wandb: str = Field("", description="project of Weights & Biases to log to as well, if it is installed; empty: none")

    @field_validator("micro_batch")
    @classmethod
    def _not_negative(cls, value: int | str) -> int | str:
        if value != "auto" and int(value) < 0:
            raise ValueError("expected a number of sequences, 0 or auto")
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.micro_batch not in (0, "auto") and self.batch_size % int(self.micro_batch):
            raise ValueError(f"micro_batch = {self.micro_batch} does not divide batch_size = {self.batch_size}")
        if self.data.packing == "streams" and self.control.batch == "ramp":
            raise ValueError("control.batch = ramp changes the number of streams; set data.packing = joined or reset")
        if self.data.packing == "streams" and self.parallel.context > 1:
            raise ValueError("parallel.context > 1 does not carry streams' states; set data.packing = joined or reset")
        tensor = self.parallel.tensor
        if why := self.model.not_shared_by(tensor):
            raise ValueError(f"parallel.tensor = {tensor} {why}")
        if tensor > 1 and self.data.packing == "streams":
            raise ValueError("parallel.tensor > 1 does not carry streams' states; set data.packing = joined or reset")
        if tensor > 1 and self.precision == "fp16":
            raise ValueError("precision = fp16 has a loss scale that parts of a layer do not share; set bf16")
        if self.parallel.context > 1 and "attention" in self.model.mixers:
            raise ValueError("parallel.context > 1 splits perception layers only; this model has attention layers")
        self._check_pipeline()
        self._check_module_precision()
        if self.optimizer.state == "8bit":
            for refused, what in (
                (tensor > 1, f"parallel.tensor = {tensor}, which cuts through blocks that share a scale"),
                (self.control.rate_from_gradients, "control.rate_from_gradients, which reads the running means"),
            ):
                if refused:
                    raise ValueError(
                        f"optimizer.state = 8bit cannot be combined with {what}; set optimizer.state = same"
                    )
        if self.parallel.data == "fsdp" and self.precision == "fp16":
            raise ValueError("precision = fp16 has a loss scale that sharded gradients do not share; set bf16")
        limit = self.control.max_batch
        if limit and (limit < self.batch_size or limit % self.batch_size):
            raise ValueError(f"control.max_batch = {limit} is not a multiple of batch_size = {self.batch_size}")
        if self.compile and self.activation_checkpointing == "selective":
            raise ValueError(
                "activation_checkpointing = selective sees no products in compiled blocks (where the compiler itself "
                "computes again what is cheap); set none or full, or compile = false"
            )
        if self.cuda_graph and self.micro_batch == "auto":
            raise ValueError("micro_batch = auto changes the shape that cuda_graph = true captures; give a number")
        if self.data.packing == "streams" and "attention" in self.model.mixers:
            raise ValueError("data.packing = streams needs a state of fixed size; attention's cache grows without end")
        if self.cuda_graph and (self.data.packing != "joined" or self.precision == "fp16"):
            raise ValueError(
                "cuda_graph = true needs batches of one shape and no loss scale: set data.packing = joined, and "
                "precision to bf16 or fp32"
            )
        return self

    def _check_module_precision(self) -> None:
        if self.module_precision.autocast and self.precision not in ("fp32", "bf16"):
            part, name = next(iter(self.module_precision.autocast.items()))
            raise ValueError(
                f"module_precision.{part} = {name} needs precision = fp32 or bf16 around it, not {self.precision}"
            )
        if self.module_precision.ffn != "fp8":
            return
        if self.precision != "bf16":
            raise ValueError(
                f"module_precision.ffn = fp8 needs precision = bf16, in which its products end, not {self.precision}"
            )
        parts = {"model.d_model": self.model.d_model, "model.ffn.hidden": self.model.ffn.hidden // self.parallel.tensor}
        for name, side in parts.items():
            if side % 16:
                shared = f" (a part of {side})" if self.parallel.tensor > 1 and name == "model.ffn.hidden" else ""
                raise ValueError(
                    f"module_precision.ffn = fp8 multiplies matrices whose sides are multiples of 16; {name} = "
                    f"{side if not shared else self.model.ffn.hidden}{shared} is not one"
                )

    def _check_pipeline(self) -> None:
        parallel, model = self.parallel, self.model
        if parallel.pipeline == 1:
            return
        if parallel.stages > model.n_layers:
            raise ValueError(
                f"parallel.pipeline = {parallel.pipeline} makes {parallel.stages} stages of model.n_layers = "
                f"{model.n_layers}; each needs a layer"
            )
        for refused, what in (
            (model.tie_embeddings, "model.tie_embeddings = true (one weight on the first and the last stage)"),
            (parallel.context > 1, "parallel.context > 1"),
            (self.cuda_graph, "cuda_graph = true"),
            (self.precision == "fp16", "precision = fp16 (its loss scale is not shared by stages; set bf16)"),
            (self.micro_batch in (0, "auto"), f"micro_batch = {self.micro_batch}; give a number of sequences"),
        ):
            if refused:
                raise ValueError(f"parallel.pipeline > 1 cannot be combined with {what}")


# -- YAML and overrides ------------------------------------------------------------------------------------------

C = TypeVar("C", bound=Config)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads ``4e-3`` as a string, ``off`` as false and ``010`` as 8; people mean what YAML 1.2 reads."""


_BOOL, _INT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:int"
_Loader.yaml_implicit_resolvers = {
    first: [rule for rule in rules if rule[0] not in (_BOOL, _INT)]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(_INT, re.compile(r"^[-+]?(?:[0-9][0-9_]*|0x[0-9a-fA-F]+)$"), list("-+0123456789"))
_Loader.add_constructor(_INT, lambda loader, node: int(node.value, 16 if "x" in node.value else 10))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in top.items():
        out[key] = _merge(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def _field_at(cls: type[BaseModel], loc: tuple[Any, ...]) -> type[BaseModel] | None:
    """The config class in which the last part of a pydantic error location is a field."""
    for part in loc[:-1]:
        if isinstance(part, int):
            continue
        field = cls.model_fields.get(str(part))
        if field is None:
            return None
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                cls = kind
                break
        else:
            return None
    return cls


def _explain(error: ValidationError, cls: type[BaseModel], origin: str) -> str:
    lines = []
    for item in error.errors():
        name = ".".join(map(str, item["loc"])) or cls.__name__
        if item["type"] == "extra_forbidden":
            owner = _field_at(cls, item["loc"])
            names = list(owner.model_fields) if owner else []
            near = difflib.get_close_matches(str(item["loc"][-1]), names, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known fields: {', '.join(names)}"
            lines.append(f"{name}: unknown field; {hint}")
        else:
            message = item["msg"].removeprefix("Value error, ")
            got = "" if isinstance(item["input"], dict) else f" (got {item['input']!r})"
            lines.append(f"{name}: {message}{got}")
    return f"{origin}: " + "; ".join(lines)


def _with_preset(values: Any, origin: str) -> Any:
    """``"30m"`` or ``{preset: 30m, ...}`` as plain fields, the given ones on top of the preset's."""
    if isinstance(values, str):
        values = {"preset": values}
    if not isinstance(values, dict) or "preset" not in values:
        return values
    name = values["preset"]
    if not isinstance(name, str):
        raise ConfigError(f"{origin}: preset must be a name, got {name!r}")
    try:
        return _merge(preset(name), {key: value for key, value in values.items() if key != "preset"})
    except ValueError as error:
        raise ConfigError(f"{origin}: {error}") from None


def build(cls: type[C], values: dict[str, Any], origin: str = "config") -> C:
    """Validate ``values`` (plain Python data) as ``cls``; `ConfigError` names every bad field.

    A ``model`` (or a top level `ModelConfig`) may name a preset that the other fields refine:
    ``{preset: 30m, n_layers: 4}``.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{origin}: expected fields and values, got {type(values).__name__}")
    if cls is ModelConfig:
        values = _with_preset(values, origin)
    elif isinstance(values.get("model"), (dict, str)) and "model" in cls.model_fields:
        values = {**values, "model": _with_preset(values["model"], origin)}
    try:
        # JSON mode is strict about numbers and strings but lets a list be a tuple, which YAML cannot write.
        return cls.model_validate_json(json.dumps(values))
    except ValidationError as error:
        raise ConfigError(_explain(error, cls, origin)) from None
    except (TypeError, ValueError) as error:  # from json.dumps: a date, a circular alias
        raise ConfigError(f"{origin}: not plain numbers, texts, lists and fields ({error})") from None


def apply_overrides(values: dict[str, Any], overrides: list[str] | tuple[str, ...]) -> dict[str, Any]:
    """``values`` with every ``a.b=c`` applied; the right side is YAML (``lr=4e-3``, ``pattern=[attention]``)."""
    for item in overrides:
        path, sep, text = item.partition("=")
        if not sep or not path:
            raise ConfigError(f"override {item!r}: expected NAME=VALUE, for example optimizer.lr=4e-3")
        try:
            value = _yaml(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"override {item!r}: {error}") from None
        for part in reversed(path.split(".")):
            value = {part: value}
        if isinstance(values.get("model"), str):
            values = {**values, "model": {"preset": values["model"]}}
        values = _merge(values, value)
    return values


def load(cls: type[C], path: str | Path | None, overrides: list[str] | tuple[str, ...] = ()) -> C:
    """Read a YAML (or JSON) file, apply overrides, validate. ``path`` None starts from the defaults."""
    values: Any = {}
    if path is not None:
        try:
            values = _yaml(Path(path).read_text(encoding="utf8")) or {}
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such config file") from None
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected fields and values, got {type(values).__name__}")
    origin = str(path or "config") + (" and overrides" if overrides else "")
    return build(cls, apply_overrides(values, overrides), origin)


def dump(config: Config) -> str:
    """The config as YAML that `load` reads back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def describe(cls: type[Config], prefix: str = "") -> list[str]:
    """Every field, one line each: ``optimizer.lr = 0.004  peak rate ...``."""
    lines: list[str] = []
    for name, info in cls.model_fields.items():
        default = info.get_default(call_default_factory=True)
        if isinstance(default, Config):
            lines += describe(type(default), f"{prefix}{name}.")
        else:
            lines.append(f"{prefix}{name} = {default!r}" + (f"  {info.description}" if info.description else ""))
    return lines


def diff(old: Config, new: Config, prefix: str = "") -> list[str]:
    """What differs, one line a field: ``optimizer.lr: 0.004 -> 0.001``."""
    lines: list[str] = []
    for name in type(old).model_fields:
        a, b = getattr(old, name), getattr(new, name)
        if isinstance(a, Config) and isinstance(b, Config):
            lines += diff(a, b, f"{prefix}{name}.")
        elif a != b:
            lines.append(f"{prefix}{name}: {a!r} -> {b!r}")
    return lines
