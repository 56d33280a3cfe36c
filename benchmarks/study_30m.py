"""The 30m preset, its transformer twin and three switches, trained on equal data (issue: foundation, real input).

    python benchmarks/study_30m.py sweep --corpus text --variant preset     # rates at a tenth of the tokens
    python benchmarks/study_30m.py final --corpus text --variant wide       # 40 M tokens at the best rate of the sweep

The switches take the rate of the preset's sweep. Corpora: ``text`` is the JSON lines files in --text (Wikipedia and
books), ``code`` those in --code (see python_source.py). Results go to benchmarks/results/30m.jsonl; samples, not
selected, to benchmarks/results/30m-samples.jsonl.
"""

from __future__ import annotations

import argparse
import glob
import json
import logging
from pathlib import Path

import torch

from llm_mlp.bench.record import record
from llm_mlp.checkpoint import load_model
from llm_mlp.config import TrainConfig, load
from llm_mlp.data import prepare
from llm_mlp.eval.text import position_bins
from llm_mlp.infer import Sampling, generate
from llm_mlp.precision import Precision
from llm_mlp.presets import TWIN
from llm_mlp.recipes import find
from llm_mlp.train import train
from llm_mlp.train.sweep import sweep

VARIANTS = {
    "preset": ["model=30m"],
    "twin": [f"model=30m{TWIN}"],
    "pure": ["model=30m", "model.perception.block=0", "model.perception.slots=0"],
    "softmax": ["model=30m", "model.perception.read=softmax"],
    "wide": ["model=30m", "model.perception.features=512"],
    "diagonal": ["model=30m", "model.perception.erase=diagonal"],
    "free": ["model=30m", "model.perception.erase=free"],
    "adaptive": ["model=30m", "model.ffn.activation=adaptive"],
    "surprise": ["model=30m", "model.perception.surprise=true"],
    "routing": ["model=30m", "model.routing.last_layers=2"],
}
PROMPTS = ("", "The", "In 1815", "She said", "The city of") * 2
CODE_PROMPTS = ("", "import", "def", "class", "#") * 2


def config_of(args: argparse.Namespace, *more: str) -> TrainConfig:
    files = sorted(glob.glob(args.text if args.corpus == "text" else args.code))
    if not files:
        raise SystemExit(f"no files match the {args.corpus} corpus")
    sources = ",".join(f"{{path: {name}}}" for name in files)
    base = [*VARIANTS[args.variant], f"data.sources=[{sources}]", f"data.cache_dir={args.cache}"]
    return load(TrainConfig, find("30m"), [*base, *args.override, *more])


def best_rate(args: argparse.Namespace) -> float:
    """The best rate of the sweep of this variant (of the preset, for a switch)."""
    swept = "twin" if args.variant == "twin" else "preset"
    lines = [json.loads(line) for line in args.results.read_text().splitlines()]
    losses = {
        line["lr"]: line["held_out_loss"]
        for line in lines
        if line["kind"] == "sweep" and line["label"] == f"{args.corpus}/{swept}"
    }
    return min(losses, key=lambda rate: losses[rate])


@torch.no_grad()
def loss_by_position(model, dataset, precision, documents: int, length: int = 8192) -> dict[str, float]:
    """Mean loss by position over the first ``documents`` held-out documents that are long enough."""
    device = next(model.parameters()).device
    sums = torch.zeros(length, dtype=torch.float64)
    count = 0
    for data in dataset.held_out:
        for i in range(data.documents):
            ids = data.document(i)
            if len(ids) < length or count >= documents:
                continue
            row = torch.tensor([[dataset.tokenizer.eos, *ids[:length].tolist()]], device=device)
            with precision.autocast():
                loss = model(row[:, :-1], targets=row[:, 1:], reduction="none").loss
            sums += loss[0].double().cpu()
            count += 1
    return {f"{a}-{b}": float(sums[a:b].mean()) / max(1, count) for a, b in position_bins(length)} | {
        "documents": count
    }


def final(args: argparse.Namespace) -> None:
    rate = args.lr or best_rate(args)
    out = Path(args.runs) / f"{args.corpus}-{args.variant}"
    config = config_of(args, f"out={out}", f"optimizer.lr={rate}")
    result = train(config, quiet=True)
    device = torch.device(config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load_model(out, device=device)
    dataset = prepare(config.data, progress=False)
    parameters = sum(p.numel() for p in model.parameters())
    position = loss_by_position(model, dataset, Precision(config.precision, device), args.documents)
    facts = {
        "corpus": args.corpus,
        "variant": args.variant,
        "parameters": parameters,
        "data": dataset.fingerprint,
        "lr": rate,
        "steps": result.steps,
        "tokens": result.tokens,
        "micro_batch": config.micro_batch or config.batch_size,
        "held_out_loss": result.evaluations[-1][1],
        "bits_per_byte": result.bits_per_byte,
        "loss_by_position": position,
        "tokens_per_second": result.tokens_per_second,
        "shared_gpu": args.shared,
        "memory_bytes": result.memory,
        "curve": [(s, round(loss, 4)) for s, loss in result.curve if s % 10 == 0],
    }
    print(record(args.results, "train", facts, device=device, seed=config.seed), flush=True)
    prompts = PROMPTS if args.corpus == "text" else CODE_PROMPTS
    for i, prompt in enumerate(prompts):
        ids = [tokenizer.eos, *tokenizer.encode(prompt)]
        text = tokenizer.decode(
            list(
                generate(
                    model,
                    ids,
                    max_tokens=120,
                    sampling=Sampling(0.8),
                    seed=i,
                    stop=tokenizer.eos,
                    vocabulary=tokenizer.vocab_size,
                )
            )
        )
        values = {"corpus": args.corpus, "variant": args.variant, "prompt": prompt, "text": text}
        record(args.samples, "sample", values, device=device, seed=i)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("sweep", "final", "prepare"))
    parser.add_argument("--corpus", choices=("text", "code"), required=True)
    parser.add_argument("--variant", choices=tuple(VARIANTS), default="preset")
    parser.add_argument("--text", default="data/corpora/*.jsonl.xz")
    parser.add_argument("--code", default="data/python.jsonl")
    parser.add_argument("--cache", default="data")
    parser.add_argument("--runs", default="runs/30m")
    parser.add_argument("--rates", default="0.001,0.002,0.004,0.008,0.016")
    parser.add_argument("--sweep-steps", type=int, default=61)
    parser.add_argument("--documents", type=int, default=24)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--shared", action="store_true", help="say in the results that other runs shared the GPU")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/30m.jsonl"))
    parser.add_argument("--samples", type=Path, default=Path("benchmarks/results/30m-samples.jsonl"))
    parser.add_argument("override", nargs="*", help="config overrides, NAME=VALUE")
    args = parser.parse_intermixed_args()
    if args.stage == "prepare":
        print(prepare(config_of(args).data, progress=False).describe())
    elif args.stage == "sweep":
        rates = [float(r) for r in args.rates.split(",")]
        config = config_of(args, f"steps={args.sweep_steps}", f"out={args.runs}/sweep-{args.corpus}-{args.variant}")
        label = f"{args.corpus}/{args.variant}"
        for found in sweep(config, [], rates, results=args.results, quiet=True, label=label):
            print(label, found.losses, "best", found.best, "interior" if found.interior else "AT THE EDGE", flush=True)
    else:
        final(args)


if __name__ == "__main__":
    main()
