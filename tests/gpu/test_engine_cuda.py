"""The engine on a CUDA device: steps from graphs, rows that come and go."""

import pytest
import torch

from llm_mlp.config import ModelConfig, build
from llm_mlp.infer import Engine, Request, Sampling
from llm_mlp.models import build_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def answers(model, asked, together, **options):
    """Tokens and log probabilities of each request; ``together``: submitted at once, else one after another."""
    engine = Engine(model, slots=16, chunk=64, **options)
    found = [[] for _ in asked]

    def finish():
        while engine.busy:
            engine.step()

    for request, events in zip(asked, found, strict=True):
        engine.submit(request, events.append)
        if not together:
            finish()
    finish()
    assert engine.load["free"] == 16
    return [[(e.token, e.logprob) for e in events if e.token is not None] for events in found]


def requests(model, count):
    g = torch.Generator().manual_seed(0)
    prompts = [torch.randint(model.config.vocab_size, (k,), generator=g).tolist() for k in range(5, 5 + 23 * count, 23)]
    return [Request(p, 40, Sampling(0), logprobs=1) for p in prompts]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_graphs_change_nothing(dtype):
    config = build(ModelConfig, {"preset": "demo"})
    model = build_model(config, device="cuda").randomize_().to(dtype).eval()
    asked = requests(model, 20)
    with_graphs, without = (answers(model, asked, True, graphs=graphs) for graphs in (True, False))
    assert all(len(found) == 40 for found in with_graphs)
    # A graph's batch is padded to a power of two, where other products may be chosen.
    for found, wanted in zip(with_graphs, without, strict=True):
        assert [token for token, _ in found] == [token for token, _ in wanted]
        logprobs = [logprob for _, logprob in wanted]
        assert [p for _, p in found] == pytest.approx(logprobs, abs=1e-4 if dtype == torch.float32 else 5e-2)


def test_invariant_to_the_bit():
    model = build_model(build(ModelConfig, {"preset": "demo"}), device="cuda").randomize_().bfloat16().eval()
    asked = requests(model, 20)
    assert answers(model, asked, True, invariant=True) == answers(model, asked, False, invariant=True)
