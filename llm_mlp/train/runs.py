"""Questions to a run's folder: which samples a step read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llm_mlp.checkpoint import CheckpointError, load_tokenizer, read_json
from llm_mlp.config import ConfigError, TrainConfig, load
from llm_mlp.data import Loader, prepare
from llm_mlp.train.console import read_lines
from llm_mlp.train.snapshot import checkpoints


@dataclass(frozen=True)
class Sample:
    """``sample``: its number in the run, from 0; ``text``: its tokens decoded, ``tokens`` of them."""

    sample: int
    tokens: int
    text: str


def read_config(run: Path) -> TrainConfig:
    """The config of a run's folder."""
    path = run / "config.yaml"
    if not path.is_file():
        raise CheckpointError(f"{run}: not the folder of a run (no config.yaml in it)")
    return load(TrainConfig, path)


def samples_of(run: Path, step: int) -> range:
    """The numbers of the samples of a step (from 1), also where the batch has grown.

    Raises:
        ConfigError: a step that the run does not have.
    """
    config = read_config(run)
    if step < 1:
        raise ConfigError(f"--step {step}: steps count from 1")
    grown = {a["step"]: int(a["value"]) for a in read_lines(run / "actions.jsonl") if a["what"] == "batch_size"}
    first, size, total = 0, config.batch_size, config.steps * config.batch_size
    for before in range(1, step):
        first += size
        size = grown.get(before, size)
        if first >= total:
            raise ConfigError(f"--step {step}: the run ends with step {before}")
    return range(first, min(first + size, total))


def which_samples(run: Path, step: int) -> list[Sample]:
    """The samples of a step, read again from the run's data.

    Raises:
        ConfigError: a step that the run does not have.
        DataError: the data are no longer those of the run.
    """
    numbers = samples_of(run, step)
    config = read_config(run)
    last = checkpoints(run)
    dataset = prepare(config.data, tokenizer=load_tokenizer(last[-1]) if last else None, progress=False)
    loader = Loader(dataset, config.data, batch_size=config.batch_size, steps_hint=config.steps)
    if last:
        loader.load_state_dict(read_json(last[-1] / "training.json")["loader"])
    found = []
    for number in numbers:
        batch = loader.samples(number, 1)
        kept = batch.tokens[0][: int((batch.targets >= 0).sum())].tolist()
        found.append(Sample(number, len(kept), dataset.tokenizer.decode(kept)))
    return found
