"""Generating: the engine is the naive loop, and every choice of sampling does what it says."""

from __future__ import annotations

import re

import pytest
import torch
from model_cases import CASES, random_model

from llm_mlp.infer import Sampling, generate, sample

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]


@pytest.mark.parametrize("case", ["plain", "attention", "hybrid", "softmax-read", "fast-weights-only", "routing"])
def test_greedy_is_the_naive_argmax(case):
    assert case in CASES
    model = random_model(case)
    ids = list(PROMPT)
    with torch.no_grad():
        for _ in range(25):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    found = list(generate(model, PROMPT, max_tokens=25, sampling=Sampling(temperature=0)))
    assert found == ids[len(PROMPT) :]


def test_a_long_prompt_is_read_in_parts(monkeypatch):
    model = random_model("plain")
    prompt = (PROMPT * 8)[:70]
    whole = list(generate(model, prompt, max_tokens=10, sampling=Sampling(0)))
    monkeypatch.setattr("llm_mlp.infer.prefill.PREFILL", 13)
    assert list(generate(model, prompt, max_tokens=10, sampling=Sampling(0))) == whole


def test_seeds():
    model = random_model("plain")
    texts = [tuple(generate(model, PROMPT, max_tokens=30, seed=seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    free = {tuple(generate(model, PROMPT, max_tokens=30)) for _ in range(3)}
    assert len(free) > 1


def test_stop_and_length():
    model = random_model("plain")
    greedy = Sampling(0)
    found = list(generate(model, PROMPT, max_tokens=20, sampling=greedy))
    assert len(found) == 20
    stop = found[7]
    assert list(generate(model, PROMPT, max_tokens=20, sampling=greedy, stop=stop)) == found[: found.index(stop)]
    assert list(generate(model, PROMPT, max_tokens=0, sampling=greedy)) == []


def test_padded_vocabulary_is_never_chosen():
    model = random_model("plain")
    assert max(generate(model, PROMPT, max_tokens=60, seed=0, vocabulary=11)) < 11


@pytest.mark.parametrize(
    ("prompt", "says"), [([], "the prompt is empty"), ([1, 61], "token 61 is outside"), ([-1], "-1")]
)
def test_bad_prompts(prompt, says):
    with pytest.raises(ValueError, match=says):
        next(generate(random_model("plain"), prompt, max_tokens=1))


# -- sampling ------------------------------------------------------------------------------------------------------

LOGITS = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0]])
WRITTEN = torch.tensor([[0, 3, 1, 0, 0]])
NONE_SEEN = torch.zeros(1, 5, dtype=torch.bool)


def chosen(sampling: Sampling, seen: torch.Tensor = NONE_SEEN, n: int = 4000) -> torch.Tensor:
    """How often each token is chosen, as shares."""
    uniform = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    many = sample(LOGITS.expand(n, -1), [sampling] * n, uniform, seen.expand(n, -1), WRITTEN.expand(n, -1))
    return torch.bincount(many, minlength=5) / n


@pytest.mark.parametrize(
    ("sampling", "logits"),
    [
        (Sampling(), LOGITS),
        (Sampling(temperature=2.0), LOGITS / 2),
        (Sampling(top_k=2), LOGITS[:, :2]),
        (Sampling(top_p=0.7), LOGITS[:, :2]),  # shares 0.56, 0.21, 0.12 ...: two hold 0.77
        (Sampling(top_p=0.5), LOGITS[:, :1]),
        (Sampling(min_p=0.2), LOGITS[:, :3]),  # relative to the best: 1, 0.37, 0.22, 0.14, 0.05
        (Sampling(top_k=100), LOGITS),
    ],
    ids=str,
)
def test_distribution(sampling, logits):
    expected = torch.zeros(5)
    expected[: logits.shape[1]] = torch.softmax(logits[0], -1)
    assert (chosen(sampling) - expected).abs().max() < 0.03
    assert ((expected == 0) <= (chosen(sampling) == 0)).all()


def test_repetition_penalty():
    seen = torch.tensor([[True, False, False, False, True]])
    penalised = LOGITS / torch.tensor([[4.0, 1, 1, 1, 0.25]])
    expected = torch.softmax(penalised[0], -1)
    assert (chosen(Sampling(repetition_penalty=4.0), seen) - expected).abs().max() < 0.03
    greedy = Sampling(temperature=0, repetition_penalty=4.0)
    assert sample(LOGITS, [greedy], torch.zeros(1), seen).tolist() == [1]


def test_penalties_of_what_was_written():
    sampling = Sampling(presence_penalty=0.5, frequency_penalty=0.25)
    expected = torch.softmax(LOGITS[0] - torch.tensor([0, 0.5 + 3 * 0.25, 0.5 + 0.25, 0, 0]), -1)
    assert (chosen(sampling) - expected).abs().max() < 0.03


def test_bias():
    expected = torch.softmax(LOGITS[0] + torch.tensor([-100.0, 0, 0, 0, 1.5]), -1)
    assert (chosen(Sampling(logit_bias={0: -100, 4: 1.5})) - expected).abs().max() < 0.03


def test_a_row_depends_on_itself_alone():
    """The same row, rules and number among others and alone; a nucleus beyond the first tokens looked at."""
    n = 11
    logits = torch.randn(n, 3000, generator=torch.Generator().manual_seed(0))
    rules = [
        Sampling(0), Sampling(), Sampling(top_p=0.97), Sampling(1.3, top_k=40, min_p=0.01), Sampling(0.7, 5),
        Sampling(top_p=0.01), Sampling(repetition_penalty=2.0, logit_bias={3: 5.0}), Sampling(top_k=2, top_p=0.9),
        Sampling(top_p=0.999), Sampling(1.1, repetition_penalty=0.7, presence_penalty=1.0, logit_bias={3: 9, 7: -1}),
        Sampling(0, frequency_penalty=2.0, logit_bias={5: 1.0}),
    ]  # fmt: skip
    uniform = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    seen = torch.rand(n, 3000, generator=torch.Generator().manual_seed(2)) < 0.1
    written = torch.randint(3, (n, 3000), generator=torch.Generator().manual_seed(3), dtype=torch.int32)
    before = logits.clone()
    whole = sample(logits, rules, uniform, seen, written)
    for b in range(n):
        row = slice(b, b + 1)
        assert sample(logits[row], [rules[b]], uniform[row], seen[row], written[row]) == whole[b]
    assert torch.equal(logits, before)
    assert whole[0] == logits[0].argmax() and whole[5] == logits[5].argmax()


def test_a_nucleus_holds_what_is_as_likely_as_its_least():
    """Which of several equals a sort puts first is nobody's choice."""
    logits = torch.tensor([[3.0, 1.0, 1.0, 1.0, 0.0]])
    numbers = torch.linspace(0, 1 - 1e-9, 500, dtype=torch.float64)
    found = sample(logits.expand(500, -1), [Sampling(top_p=0.75)] * 500, numbers)
    assert found.unique().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
def test_what_cannot_be_is_not_chosen(u):
    logits = torch.tensor([[-torch.inf, 1.0, 2.0, -torch.inf]])
    assert sample(logits, [Sampling()], torch.tensor([u], dtype=torch.float64)).item() == (1 if u == 0 else 2)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1),
        ("top_k", -1),
        ("top_p", 0),
        ("top_p", 1.1),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("presence_penalty", 3),
        ("frequency_penalty", -2.5),
        ("logit_bias", {1: 101.0}),
    ],
)
def test_bad_values(field, value):
    with pytest.raises(ValueError, match=re.escape(f"{field} = {value} must be")):
        Sampling(**{field: value})
