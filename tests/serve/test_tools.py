"""Every form in which an OpenAI client speaks of tools: shown to the model by its template, or refused by field."""

from __future__ import annotations

import json

import httpx
import openai
import pytest
from serve_cases import serving, small_model

from llm_mlp.data.chat import TRAINED

# In the manner of the templates that tool-calling models come with.
TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for m in messages %}[{{ m.role }}{{ ' ' + m.tool_call_id if m.tool_call_id else '' }}]{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call {{ c.id }}>{{ c.function.name }}:{{ c.function.arguments | tojson }}</call>"
    "{% endfor %}{{ eos_token if m.role == 'assistant' else '' }}{% endfor %}"
    "{{ '[assistant]' if add_generation_prompt else '' }}"
)
SCHEMA = {"type": "object", "properties": {"where": {"type": "string"}, "when": {"type": ["string", "null"]}}}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "é", "parameters": SCHEMA, "strict": True}},
    {"type": "function", "function": {"name": "now"}},
]
ASK = [{"role": "user", "content": "The mill"}]
CALLS = [
    {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"where": "mill", "when": null}'}},
    {"id": "c2", "type": "function", "function": {"name": "now", "arguments": ""}},
]
TURN = [
    *ASK,
    {"role": "assistant", "content": None, "tool_calls": CALLS},
    {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "noo"}, {"type": "text", "text": "n"}]},
]


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    with serving(tmp_path_factory.mktemp("store"), model=model, template=TEMPLATE, slots=2) as found:
        yield found


@pytest.fixture(scope="module")
def plain(model, tmp_path_factory):
    """Without a template of the model's own."""
    with serving(tmp_path_factory.mktemp("store"), model=model, slots=2) as found:
        yield found


def asked(server, **body):
    """The text that the model was given, by the official client."""
    url, service = server
    with openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        found = client.chat.completions.create(
            **{"model": "llm-mlp", "max_tokens": 1, "temperature": 0, "extra_body": {"save_context": "asked"}, **body}
        )
    message = found.choices[0].message
    assert message.role == "assistant" and isinstance(message.content, str) and message.tool_calls is None
    assert found.choices[0].finish_reason in ("length", "stop")
    kept = service.store("").get("asked").tokens.tolist()
    service.store("").remove("asked")
    return service.tokenizer.decode(kept[1 : found.usage.prompt_tokens])


@pytest.mark.parametrize(
    ("how", "shown"),
    [
        ({"tools": TOOLS}, True),
        ({"tools": TOOLS, "tool_choice": "auto", "parallel_tool_calls": True}, True),
        ({"tools": TOOLS, "tool_choice": "none", "parallel_tool_calls": False}, False),
        ({"tools": []}, False),
        ({"tool_choice": "auto"}, False),
        ({"tool_choice": "none"}, False),
    ],
)
def test_tools_are_shown_as_they_were_sent(server, how, shown):
    tools = f"<tools>{json.dumps(TOOLS, ensure_ascii=False)}</tools>" if shown else ""
    assert asked(server, messages=ASK, **how) == f"{tools}[user]The mill[assistant]"


def test_calls_and_their_results_are_shown(server, plain):
    want = (
        '[user]The mill[assistant]<call c1>weather:{"where": "mill", "when": null}</call><call c2>now:{}</call>'
        "[tool c1]rain[tool c2]noon[assistant]"
    )
    assert asked(server, messages=TURN) == want
    spoken = [*ASK, {"role": "assistant", "content": "I ask.", "tool_calls": CALLS[1:]}, TURN[-1]]
    assert asked(server, messages=spoken).startswith("[user]The mill[assistant]I ask.<call c2>now:{}</call>")
    lines = ['tools: [{"type": "function", "function": {"name": "now"}}]', "user: The mill", "assistant: "]
    lines += ['{"name": "weather", "arguments": {"where": "mill", "when": null}}', '{"name": "now", "arguments": {}}']
    lines += ["tool: rain", "tool: noon", "assistant: "]
    assert asked(plain, messages=TURN, tools=TOOLS[1:]) == "\n".join(lines)


def test_the_clients_own_helpers(server):
    """A tool made of a pydantic model, and streams."""
    from pydantic import BaseModel

    class Weather(BaseModel):
        """Of a place."""

        where: str

    tool = openai.pydantic_function_tool(Weather)
    assert asked(server, messages=ASK, tools=[tool]).startswith(f"<tools>[{json.dumps(tool)}]</tools>")
    with openai.OpenAI(base_url=server[0] + "/v1", api_key="none", max_retries=0) as client:
        how = {"model": "llm-mlp", "messages": TURN, "tools": TOOLS, "max_tokens": 3, "stream": True}
        chunks = list(client.chat.completions.create(**how))
    assert all(not c.choices[0].delta.tool_calls for c in chunks) and chunks[0].choices[0].delta.role == "assistant"


FORCED = {"type": "function", "function": {"name": "now"}}
ALLOWED = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": TOOLS[1:]}}


@pytest.mark.parametrize(
    ("how", "field", "says"),
    [
        ({"tools": TOOLS, "tool_choice": "required"}, "tool_choice", "cannot be forced"),
        ({"tools": TOOLS, "tool_choice": FORCED}, "tool_choice", "'auto' and 'none' are served"),
        ({"tools": TOOLS, "tool_choice": ALLOWED}, "tool_choice", "cannot be forced"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice", "'auto' and 'none' are served"),
        ({"tools": TOOLS, "parallel_tool_calls": False}, "parallel_tool_calls", "number of calls"),
        ({"tools": TOOLS, "parallel_tool_calls": "x"}, "parallel_tool_calls", "valid boolean"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools.0.type", "'function'"),
        ({"tools": [{"type": "function"}]}, "tools.0.function", "required"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools.0.function.name", "required"),
        ({"tools": {"name": "x"}}, "tools", "list"),
        ({"functions": [{"name": "now"}]}, "functions", "tools and tool_choice are"),
        ({"function_call": "auto"}, "function_call", "tools and tool_choice are"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0", "content: a text is missing"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages.0", "content: a text is missing"),
        ({"messages": [{"role": "assistant", "tool_calls": []}]}, "messages.0", "content: a text is missing"),
        ({"messages": [*ASK, {"role": "tool", "content": "x"}]}, "messages.1", "tool_call_id: missing"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": CALLS}]}, "messages.0", "an assistant calls"),
    ],
)  # fmt: skip
def test_what_is_not_served_is_refused_with_its_field(server, how, field, says):
    with (
        openai.OpenAI(base_url=server[0] + "/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.BadRequestError) as refused,
    ):
        client.chat.completions.create(**{"model": "llm-mlp", "messages": ASK, "max_tokens": 1, **how})
    assert refused.value.param == field and says in refused.value.body["message"], refused.value.body


@pytest.mark.parametrize("arguments", ["{", "[1]", "1", '{"a":' * 100_000])
def test_arguments_that_are_no_object(server, arguments):
    call = {"id": "c", "type": "function", "function": {"name": "now", "arguments": arguments}}
    body = {"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}]}
    found = httpx.post(server[0] + "/v1/chat/completions", json=body)
    assert found.status_code == 400 and "messages.0.tool_calls.0.function.arguments: not a JSON" in found.text


def test_a_template_that_does_not_show_them_is_not_given_them(model, tmp_path):
    with serving(tmp_path, model=model, template=TRAINED, slots=1) as (url, _):
        for body, field in (({"messages": ASK, "tools": TOOLS}, "tools"), ({"messages": TURN}, "messages")):
            found = httpx.post(url + "/v1/chat/completions", json=body | {"max_tokens": 1})
            assert found.status_code == 400 and found.json()["error"]["param"] == field
            assert "chat template does not show" in found.json()["error"]["message"]
        quiet = {"messages": ASK, "tools": TOOLS, "tool_choice": "none", "max_tokens": 1}
        assert httpx.post(url + "/v1/chat/completions", json=quiet, timeout=60).status_code == 200
