"""What weights in fewer bits, and states kept in fewer, cost in held-out loss.

    llm-mlp train demo --out runs/demo-only
    python benchmarks/loss_of_settings.py runs/demo-only [--length 4096] [--device cuda]

Reads the beginnings of the run's held-out documents twice in each setting, the state carried through: in pieces of 512
tokens, as prompts are read, and token by token, as decoding does. Results go to benchmarks/results/settings.jsonl.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llm_mlp.bench.record import record
from llm_mlp.checkpoint import load_model
from llm_mlp.config import TrainConfig, load
from llm_mlp.data import prepare
from llm_mlp.device import pick_device
from llm_mlp.infer import state_bytes
from llm_mlp.models import LM
from llm_mlp.weights import weight_bytes

PIECE = 512
SETTINGS = [
    ("fp32", "auto"),
    ("bf16", "fp32+bf16"),
    ("bf16", "bf16+bf16"),
    ("bf16", "bf16+8bit"),
    ("int8", "fp32+bf16"),
    ("int8", "bf16+8bit"),
    ("int4", "fp32+bf16"),
]


@torch.no_grad()
def in_pieces(model: LM, ids: Tensor) -> float:
    """Nats a token of ids ``[B, T+1]``, each row a text."""
    state, nats = None, 0.0
    for a in range(0, ids.shape[1] - 1, PIECE):
        part = ids[:, a : a + PIECE + 1]
        out = model(part[:, :-1], state, targets=part[:, 1:], reduction="sum")
        state, nats = out.state, nats + float(out.loss)
    return nats / ids[:, 1:].numel()


def by_steps(model: LM, ids: Tensor) -> float:
    state, nats = model.init_state(len(ids)), torch.zeros((), dtype=torch.float64, device=ids.device)
    for t in range(ids.shape[1] - 1):
        nats += F.cross_entropy(model.step(ids[:, t], state), ids[:, t + 1], reduction="sum")
    return float(nats) / ids[:, 1:].numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--length", type=int, default=4096, help="tokens of each document; shorter ones are left out")
    parser.add_argument("--documents", type=int, default=8, help="at most")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--results", default="benchmarks/results/settings.jsonl")
    args = parser.parse_args()
    device = pick_device(args.device)
    dataset = prepare(load(TrainConfig, args.run / "config.yaml", []).data)
    texts = [data.document(i) for data in dataset.held_out for i in range(data.documents)]
    kept = [t[: args.length] for t in texts if len(t) >= args.length][: args.documents]
    if not kept:
        raise SystemExit(f"no held-out document of {args.run} has {args.length} tokens; give a smaller --length")
    rows = np.stack([np.concatenate([[dataset.tokenizer.eos], t]) for t in kept]).astype(np.int64)
    ids = torch.from_numpy(rows).to(device)
    for weights, state in SETTINGS:
        model, _ = load_model(args.run, device=device, weights=weights, state=state)
        facts = {"weights": weights, "state": state, "documents": len(kept), "length": args.length, "piece": PIECE}
        facts |= {"weight_bytes": weight_bytes(model), "state_bytes": state_bytes(model)}
        facts |= {"loss_in_pieces": in_pieces(model, ids), "loss_by_steps": by_steps(model, ids)}
        print(record(args.results, "loss-of-settings", facts, device=device, seed=0), flush=True)


if __name__ == "__main__":
    main()
