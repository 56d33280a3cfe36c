"""From instruction records to an answer: a run learns them, and the folder it leaves answers over HTTP by the very ids
it was trained on."""

from __future__ import annotations

import openai
import pytest
import torch
from serve_cases import serving
from train_cases import ANSWERS, records, run, tiny, write_records

from llm_mlp.checkpoint import load_model, read_tensors
from llm_mlp.context import Reader
from llm_mlp.data import ChatTemplate, Loader, prepare
from llm_mlp.data.chat import TRAINED
from llm_mlp.infer import Sampling
from llm_mlp.serve.talk import Talk


def test_learns_and_answers_over_http(tmp_path):
    result = run(tmp_path, *records(tmp_path, "steps=80", "batch_size=8"))
    assert result.loss < 0.1 * result.curve[0][1] and result.bits_per_byte < 1
    for folder in ("model", "checkpoints/step-0000080"):
        assert (tmp_path / "run" / folder / "chat_template.jinja").read_text() == TRAINED
    model, tokenizer = load_model(tmp_path / "run")
    with (
        serving(tmp_path / "store", model=(model, tokenizer), template=tokenizer.chat_template) as (url, service),
        openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client,
    ):
        chat = ChatTemplate(tokenizer)
        messages: list[dict] = []
        for thing in ("sun", "barn"):
            messages.append({"role": "user", "content": f"{thing}?"})
            found = client.chat.completions.create(
                model="llm-mlp",
                messages=messages,  # type: ignore[arg-type]
                temperature=0,
                max_tokens=30,
                extra_body={"save_context": f"after-{thing}"},
            )
            answer = found.choices[0]
            assert (answer.message.content, answer.finish_reason) == (ANSWERS[thing], "stop")
            messages.append({"role": "assistant", "content": answer.message.content})
            # What is stored is the conversation as training knows it, its last token included.
            kept = service.store("").get(f"after-{thing}", service.reader).tokens.tolist()
            assert kept == [tokenizer.eos, *chat.encode(messages).ids]
            # So the next turn finds all of it, and none is read again.
            if thing == "barn":
                cached = found.usage.prompt_tokens_details  # type: ignore[union-attr]
                assert cached.cached_tokens == len([tokenizer.eos, *chat.encode(messages[:2]).ids])
        # Or goes on from the stored context, with its own message alone.
        found = client.chat.completions.create(
            model="llm-mlp",
            messages=[{"role": "user", "content": "sea?"}],
            temperature=0,
            max_tokens=30,
            extra_body={"context": "after-barn", "save_context": "after-sea"},
        )
        assert found.choices[0].message.content == "blue"
        messages += [{"role": "user", "content": "sea?"}, {"role": "assistant", "content": "blue"}]
        kept = service.store("").get("after-sea", service.reader).tokens.tolist()
        assert kept == [tokenizer.eos, *chat.encode(messages).ids]
    talk = Talk(Reader(model, tokenizer), ChatTemplate(tokenizer))
    assert ["".join(talk.say(f"{thing}?", 30, Sampling(0), None)) for thing in ("sun", "barn", "sea")] == [
        "warm",
        "red",
        "blue",
    ]
    assert talk.context().tokens.tolist() == kept


def test_the_server_reads_what_training_wrote(tmp_path):
    """The ids before each answer of a conversation: in a batch of the loader, and in the server."""
    config = tiny(tmp_path, *records(tmp_path, "data.held_out=0"))
    dataset = prepare(config.data, progress=False)
    batch = Loader(dataset, config.data, batch_size=64, steps_hint=1).batch(0)
    cu, template = batch.cu_seqlens.tolist(), ChatTemplate(dataset.tokenizer)
    trained = set()
    for a, b in zip(cu, cu[1:], strict=False):
        tokens, targets = batch.tokens[0, a:b].tolist(), batch.targets[0, a:b].tolist()
        begins = [n for n in range(b - a) if targets[n] >= 0 and (n == 0 or targets[n - 1] < 0)]
        trained |= {tuple(tokens[: n + 1]) for n in begins}
    turns = [("sun?", "warm"), ("sea?", "blue")]
    messages = []
    for question, answer in turns:
        messages.append({"role": "user", "content": question})
        served = [dataset.tokenizer.eos, *template.encode(messages, generate=True).ids]
        assert tuple(served) in trained
        messages.append({"role": "assistant", "content": answer})


@pytest.mark.parametrize("more", [[], ["micro_batch=2", "precision=bf16"]], ids=["", "micro"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, more):
    texts = f"{{path: '{tiny(tmp_path).data.sources[0].path}'}}"
    mixed = records(tmp_path, f"data.sources=[{{path: '{write_records(tmp_path)}', format: instruct}}, {texts}]", *more)
    whole = run(tmp_path, *mixed, out="whole")
    first = run(tmp_path, *mixed, stop_after=3)
    second = run(tmp_path, *mixed, resume=True)
    assert first.curve + second.curve == whole.curve and second.evaluations == whole.evaluations
    for part in ("model.safetensors", "training.safetensors"):
        one, other = (read_tensors(tmp_path / name / "checkpoints/step-0000006" / part) for name in ("whole", "run"))
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_one_run_after_another(tmp_path):
    """Texts, then records, then texts again: the last still knows how to chat."""
    run(tmp_path, out="base")
    assert not (tmp_path / "base/model/chat_template.jinja").exists()
    tuned = run(tmp_path, *records(tmp_path, "steps=2"), out="tuned", init_from=tmp_path / "base")
    assert len(tuned.curve) == 2
    run(tmp_path, "steps=2", out="more", init_from=tmp_path / "tuned")
    assert (tmp_path / "more/model/chat_template.jinja").read_text() == TRAINED
    # A template of one's own goes with all that comes after.
    mine = tmp_path / "mine.jinja"
    mine.write_text(TRAINED.replace(":\\n", "> "))
    run(tmp_path, *records(tmp_path, "steps=2", f"data.chat_template='{mine}'"), out="own", init_from=tmp_path / "base")
    run(tmp_path, *records(tmp_path, "steps=2"), out="next", init_from=tmp_path / "own")
    for name in ("own", "next"):
        assert (tmp_path / name / "model/chat_template.jinja").read_text() == mine.read_text()


def test_a_changed_template_is_not_resumed(tmp_path):
    mine = tmp_path / "mine.jinja"
    mine.write_text(TRAINED)
    overrides = records(tmp_path, f"data.chat_template='{mine}'")
    run(tmp_path, *overrides, stop_after=3)
    mine.write_text(TRAINED.replace(":\\n", "> "))
    with pytest.raises(ValueError, match="the data differ from those the run was started with .chat_template: "):
        run(tmp_path, *overrides, resume=True)
