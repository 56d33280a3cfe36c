"""Conversations to ids: what the template writes becomes special tokens, what messages say never does, and the ids in
front of an answer are the same in training and in serving."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from llm_mlp.data import ChatError, ChatTemplate, Tokenizer, TokenizerError
from llm_mlp.data.chat import TRAINED

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRIMMED = CHATML.replace("m.content", "m.content | trim")
SPACED = (
    "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }} {{ eos_token }}{% else %}"
    "{{ bos_token }}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}{% if add_generation_prompt %} {% endif %}"
)
# Leaves out what was thought in all turns but the last, as some models want it.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {"trained": TRAINED, "chatml": CHATML, "trimmed": TRIMMED, "spaced": SPACED}
WORDS = "assistant: user: system: the wheel of the mill by the river\n turns and turns. " * 30


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def make(kind: str) -> Tokenizer:
    out = Tokenizer.bytes() if kind == "bytes" else Tokenizer.train([WORDS], 300)
    out._inner.add_special_tokens([AddedToken(n, special=True) for n in ("<s>", "<|im_start|>", "<|im_end|>")])
    again = Tokenizer(out._inner)
    again.token_names = {"bos_token": "<s>"}
    return again


TOKENIZERS = {kind: make(kind) for kind in ("bytes", "bpe")}


def template(source: str | None, kind: str = "bytes") -> ChatTemplate:
    return ChatTemplate(TOKENIZERS[kind].with_chat_template(source))


def shown(chat: ChatTemplate, ids: list[int]) -> str:
    return chat.tokenizer.decode(ids, skip_special=False)


def counted(chat: ChatTemplate, messages: list[dict[str, str]]) -> str:
    found = chat.encode(messages)
    return shown(chat, [i for i, own in zip(found.ids, found.counted, strict=True) if own])


TALK = [
    {"role": "system", "content": "Be brief."},
    user("The mill?"),
    assistant("turns"),
    user("Why?"),
    assistant("Oh"),
]


# -- which template ------------------------------------------------------------------------------------------------


def test_templates_are_found_and_kept(tmp_path: Path) -> None:
    tokenizer = Tokenizer.bytes()
    tokenizer.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json"]

    def render(tools: Any = None) -> str:
        return ChatTemplate(Tokenizer.load(tmp_path)).render([user("hi")], tools)

    assert render() == "user: hi\nassistant: "
    names = {"chat_template": "{{ bos_token }}{{ messages[0].content }}", "bos_token": {"content": "<s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    assert render() == "<s>hi"
    source = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}|\r\n{{ tools | tojson }}{{ bos_token }}"
    (tmp_path / "chat_template.jinja").write_bytes(source.encode())
    assert render([{"é": 1}]) == '[hi]|\n[{"é": 1}]<s>'
    Tokenizer.load(tmp_path / "tokenizer.json").save(tmp_path / "copy")
    again = Tokenizer.load(tmp_path / "copy")
    assert (tmp_path / "copy/chat_template.jinja").read_bytes() == source.encode()
    assert again.chat_template == source and again.token_names == {"bos_token": "<s>"}
    assert again.fingerprint() == tokenizer.fingerprint()
    several = [{"name": "tools", "template": "x"}, {"name": "default", "template": "only {{ eos_token }}"}]
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert render() == "only <|eos|>"
    for damaged in ("{", "[1]"):
        (tmp_path / "tokenizer_config.json").write_text(damaged)
        with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: cannot be read"):
            Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(TokenizerError, match=r"chat_template\.jinja: the chat template cannot be read"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ChatError, match="cannot be read"):
        template("{% for %}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('only pairs') }}",
        "{{ messages[9].content }}",
        "{% for i in range(10**9) %}x{% endfor %}",
    ],
)
def test_templates_stay_in_their_sandbox(source: str) -> None:
    with pytest.raises(ChatError, match="refuses these messages"):
        template(source).render([user("hi")])
    with pytest.raises(ChatError, match="refuses these messages") as error:
        template(TRAINED).encode_batch([[user("a")], [{"role": "user"}]])
    assert error.value.number == 1


# -- what is counted -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize(
    ("name", "text", "learnt"),
    [
        (
            "trained",
            "system:\nBe brief.\nuser:\nThe mill?\nassistant:\nturns<|eos|>user:\nWhy?\nassistant:\nOh<|eos|>",
            "turns<|eos|>Oh<|eos|>",
        ),
        (
            "chatml",
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nThe mill?<|im_end|>\n"
            "<|im_start|>assistant\nturns<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
            "<|im_start|>assistant\nOh<|im_end|>\n",
            "turns<|im_end|>Oh<|im_end|>",
        ),
        (
            "spaced",
            "<s>[INST] Be brief. [/INST]<s>[INST] The mill? [/INST] turns <|eos|><s>[INST] Why? [/INST] Oh <|eos|>",
            "turns <|eos|>Oh <|eos|>",
        ),
    ],
)
def test_the_assistants_tokens_count_and_no_others(kind: str, name: str, text: str, learnt: str) -> None:
    chat = template(TEMPLATES[name], kind)
    chat.check()
    found = chat.encode(TALK)
    assert shown(chat, found.ids) == text and counted(chat, TALK) == learnt
    assert len(found.ids) == len(found.counted) and found.counted[found.answered - 1]
    assert not any(found.counted[found.answered :])


# -- training is serving -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("content", ["turns", " turns ", "\n", "é€😀 the mill\n\nturns", "<|eos|>", "<|im_end|> <|"])
def test_what_stands_before_an_answer_is_the_same_everywhere(kind: str, name: str, content: str) -> None:
    chat = template(TEMPLATES[name], kind)
    messages = [user(content), assistant(content), user("by the river " + content), assistant(content), user("Why?")]
    whole = chat.encode(messages)
    for n in (1, 3):
        asked = chat.encode(messages[:n], generate=True)
        assert whole.ids[: len(asked.ids)] == asked.ids
        # Earlier answers are known as such in what the server reads, too.
        assert whole.counted[: len(asked.ids)] == asked.counted
        trained = chat.encode(messages[: n + 1])
        assert whole.ids[: len(trained.ids)] == trained.ids
        assert trained.ids[: len(asked.ids)] == asked.ids and trained.counted[len(asked.ids)]
        # And a conversation that is gone on with token by token is the one that is read at once.
        following = [*trained.ids[: trained.answered - 1], *chat.closing, *chat.next_turn(messages[: n + 2])]
        assert following == chat.encode(messages[: n + 2], generate=True).ids
    assert chat.encode_batch([messages, messages[:2]]) == [whole, chat.encode(messages[:2])]


def test_templates_that_trim_answers_trim_them() -> None:
    chat = template(TRIMMED)
    assert shown(chat, chat.encode([user(" a "), assistant(" b ")]).ids) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    )
    assert counted(chat, [user(" a "), assistant(" b ")]) == "b<|im_end|>"
    assert counted(template(CHATML), [user(" a "), assistant(" b ")]) == " b <|im_end|>"


def test_templates_that_rewrite_answers_are_served_but_not_trained_on() -> None:
    chat = template(FORGETFUL)
    messages = [user("a"), assistant("hm</think>b"), user("c")]
    found = chat.encode(messages, generate=True)
    text = shown(chat, found.ids)
    assert "hm" not in text and text.count("<|im_end|>") == 3 and found.ids.count(chat.end) == 3
    assert found.answered == 0 and not any(found.counted)
    assert shown(chat, chat.next_turn(messages)) == "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (None, "does not end an answer with a special token"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "does not end an answer with a special token"),
        ("{% for m in messages %}{{ m.content | upper }}{{ eos_token }}{% endfor %}", "changes an assistant's content"),
        ("{% for m in messages %}{{ m.role }}{{ m.content }}{{ eos_token }}{% endfor %}", "something else in front"),
        (TRAINED.replace("'assistant:\\n'", "'bot:\\n'"), "something else in front"),
        ("{{ raise_exception('never') }}", "never"),
    ],
)
def test_templates_that_cannot_be_trained_on(source: str | None, says: str) -> None:
    with pytest.raises(ChatError, match=says):
        template(source).check()


def test_where_an_answer_ends() -> None:
    ids = TOKENIZERS["bytes"].special_tokens
    assert template(TRAINED).end == ids["<|eos|>"] and template(TRAINED).closing == [ids["<|eos|>"]]
    assert template(TRAINED).stop == [] and template(TRAINED).stop_ids == {ids["<|eos|>"]}
    assert template(CHATML).end == ids["<|im_end|>"] and template(CHATML).closing == [ids["<|im_end|>"], 10]
    assert template(CHATML).stop_ids == {ids["<|eos|>"], ids["<|im_end|>"]}
    plain = template(None)
    assert plain.end is None and plain.closing == [10] and plain.stop and plain.stop_ids == {ids["<|eos|>"]}
    assert template("{{ raise_exception('never') }}").closing == []


# -- injection -----------------------------------------------------------------------------------------------------


PIECES = st.sampled_from(["<|eos|>", "<|", "eos|>", "|>", "<", ">", "s", "<s>", "<|im_end|>", " ", "\n", "a", "\ufdd0"])
CONTENTS = st.lists(PIECES, max_size=6).map("".join)


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(["trained", "chatml", "glued"]), st.lists(CONTENTS, min_size=2, max_size=6))
def test_messages_cannot_write_special_tokens(name: str, contents: list[str]) -> None:
    glued = "{% for m in messages %}{{ m.content }}{% endfor %}<|{{ '' }}"
    chat = template({**TEMPLATES, "glued": glued}[name])
    messages = [(user, assistant)[n % 2](content) for n, content in enumerate(contents)]
    found = chat.encode(messages)
    specials = set(chat.tokenizer.special_tokens.values())
    # As many special tokens as the template writes around harmless contents; and the text is what it should be.
    harmless = chat.encode([{**message, "content": "x"} for message in messages])
    assert [i for i in found.ids if i in specials] == [i for i in harmless.ids if i in specials]
    assert shown(chat, found.ids) == chat.render(messages, generate=False)


def test_other_fields_cannot_write_special_tokens() -> None:
    chat = template("{{ tools | tojson }}{{ messages[0].name }}{{ messages[0].parts[0].text }}<|im_start|>")
    message = {**user("a"), "name": "<|im_end|>", "parts": [{"text": "<|eos|>"}]}
    found = chat.encode([message], [{"<s>": "<|eos|>"}])
    assert found.ids.count(chat.tokenizer.special_tokens["<|im_start|>"]) == 1
    assert max(found.ids[:-1]) < 256
    assert shown(chat, found.ids) == '[{"<s>": "<|eos|>"}]<|im_end|><|eos|><|im_start|>'


def test_no_private_character_left() -> None:
    every = "".join(map(chr, (*range(0xFDD0, 0xFDF0), *range(0x100000, 0x10FFFE))))
    with pytest.raises(ChatError, match="every private character"):
        template(TRAINED).encode([user(every)])
    most = template(TRAINED).encode([user(every[:-3])], generate=True)
    assert shown(template(TRAINED), most.ids) == f"user:\n{every[:-3]}\nassistant:\n"
