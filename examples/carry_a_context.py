"""Read a text once, keep the state, and continue it two ways: a fork costs one copy of a state of fixed size.

    python examples/carry_a_context.py [CHECKPOINT]

Without a checkpoint a small untrained model stands in: the point is the state, not the words.
"""

import sys

import torch

from llm_mlp.checkpoint import load_model
from llm_mlp.config import ModelConfig, build
from llm_mlp.data import Tokenizer
from llm_mlp.models import build_model

if len(sys.argv) > 1:
    model, tokenizer = load_model(sys.argv[1])
else:
    model = build_model(build(ModelConfig, {"preset": "demo"})).randomize_().eval()
    tokenizer = Tokenizer.bytes()

text = "The old man and the sea, the boy, the boat and the fish. " * 20
with torch.no_grad():
    state = model(torch.tensor([[tokenizer.eos, *tokenizer.encode(text)]]), logits="none").state
    print(f"{len(text)} characters read; the state holds {sum(t.nbytes for t in state.values()):,} bytes")

    for question in ("The boy", "The fish"):
        fork = {name: t.clone() for name, t in state.items()}
        out = model(torch.tensor([tokenizer.encode(question)]), fork, logits="last")
        words, logits = [], out.logits[:, -1]
        for _ in range(20):
            token = logits[:, : tokenizer.vocab_size].argmax(-1)
            words.append(int(token))
            logits = model.step(token, out.state)
        print(f"{question!r} -> {tokenizer.decode(words)!r}")
