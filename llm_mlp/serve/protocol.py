"""What requests may hold: OpenAI's fields, and ``context``, ``save_context``, ``top_k``, ``min_p``,
``repetition_penalty`` and ``regex`` beside them."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    ValidationInfo,
    field_validator,
    model_validator,
)

from llm_mlp.infer import Sampling


class Body(BaseModel):
    """A body of OpenAI's: clients send fields of newer versions, which are ignored and named in the log."""

    model_config = ConfigDict(extra="allow")

    @property
    def ignored(self) -> list[str]:
        """Names of fields that mean nothing here."""
        return [name[:64] for name in list(self.model_extra or {})[:16]]


class OwnBody(BaseModel):
    """A body of this project's own paths."""

    model_config = ConfigDict(extra="forbid")


class Generation(Body):
    """Fields that both ways of writing share."""

    model: str = ""
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=100)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    n: int | None = Field(None, ge=1, le=16)
    stream: bool | None = False
    stream_options: dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    regex: str | None = Field(None, description="the answer matches it, from its begin to its end")
    context: str | None = Field(None, description="go on from this stored context")
    save_context: str | None = Field(None, description="store the state after the answer so; `context_error`: why not")

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        texts = [value] if isinstance(value, str) else value or []
        if len(texts) > 16 or any(not 0 < len(text) <= 1000 for text in texts):
            raise ValueError("at most 16 texts of 1 to 1,000 characters")
        return value

    @field_validator("response_format")
    @classmethod
    def _known_form(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is None or value.get("type") in ("text", "json_object"):
            return value
        if value.get("type") != "json_schema":
            raise ValueError(f"type {value.get('type')!r} is not served; 'text', 'json_object' and 'json_schema' are")
        inner = value.get("json_schema")
        if not isinstance(inner, dict) or not isinstance(inner.get("schema"), dict):
            raise ValueError("json_schema.schema: a JSON schema (an object) is missing")
        return value

    @model_validator(mode="after")
    def _one_form(self) -> Generation:
        if self.regex is not None and self.schema_asked is not None:
            raise ValueError("regex: response_format asks for JSON already; one of them a request")
        return self

    @property
    def schema_asked(self) -> dict[str, Any] | None:
        """The JSON schema that the answer has to satisfy."""
        form = self.response_format or {}
        if form.get("type") == "json_schema":
            return form["json_schema"]["schema"]
        return {"type": "object"} if form.get("type") == "json_object" else None

    @model_validator(mode="after")
    def _one_saved(self) -> Generation:
        if self.save_context and (self.n or 1) > 1:
            raise ValueError("save_context: one answer can be saved, n asks for several")
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @property
    def usage_in_stream(self) -> bool:
        return bool((self.stream_options or {}).get("include_usage"))

    def sampling(self) -> Sampling:
        """Raises `ValueError` for a ``logit_bias`` that is none."""
        try:
            bias = {int(i): value for i, value in (self.logit_bias or {}).items()}
        except ValueError:
            raise ValueError("logit_bias: keys are token ids") from None

        def given(value: float | None, default: float) -> float:
            return default if value is None else value

        return Sampling(
            temperature=given(self.temperature, 1.0),
            top_k=self.top_k,
            top_p=given(self.top_p, 1.0),
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=given(self.presence_penalty, 0.0),
            frequency_penalty=given(self.frequency_penalty, 0.0),
            logit_bias=bias,
        )


class Passed(BaseModel):
    """What the template gets with all of its fields."""

    model_config = ConfigDict(extra="allow")


class Function(Passed):
    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="a JSON schema; the model is told, nothing is checked")


class Tool(Passed):
    type: Literal["function"]
    function: Function
    _sent: dict[str, Any] = PrivateAttr()  # as the client sent it, in its order: the template writes that

    @model_validator(mode="wrap")
    @classmethod
    def _keep(cls, value: Any, check: ModelWrapValidatorHandler[Tool]) -> Tool:
        made = check(value)
        made._sent = value
        return made


class CalledFunction(Passed):
    name: str = Field(min_length=1, max_length=256)
    arguments: str | dict[str, Any] = Field("", description="a JSON object, as text")

    @field_validator("arguments")
    @classmethod
    def _object(cls, value: str | dict[str, Any]) -> dict[str, Any]:
        """Templates expect the object itself, as `transformers` gives it to them."""
        try:
            found = value if isinstance(value, dict) else json.loads(value or "{}")
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise ValueError("not a JSON object")
        return found


class ToolCall(Passed):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Passed):
    role: str = Field(max_length=64)
    content: str | list[dict[str, Any]] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _complete(self) -> Message:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("content: a text is missing; only an assistant's message with tool_calls may have none")
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls: an assistant calls tools, {self.role!r} does not")
        if self.role == "tool" and not self.tool_call_id:
            raise ValueError("tool_call_id: missing; the call that this message answers has it as its id")
        return self

    def plain(self) -> dict[str, Any]:
        """With its parts of text as one text, "" where there is none."""
        row = {name: value for name, value in self.model_dump(exclude_unset=True).items() if value is not None}
        if isinstance(self.content, list):
            for part in self.content:
                if part.get("type") != "text" or not isinstance(part.get("text"), str):
                    raise ValueError(f"content: parts of type {part.get('type')!r} are not served, text is")
            row["content"] = "".join(part["text"] for part in self.content)
        return row | {"content": row.get("content", "")}


class ChatRequest(Generation):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] | None = None
    tool_choice: Any = Field(None, description='"auto" or "none"; a call cannot be forced')
    parallel_tool_calls: bool | None = Field(None, description="with tools not false: calls are text, of any number")
    functions: Any = Field(None, description="not served: tools are")
    function_call: Any = Field(None, description="not served: tool_choice is")

    @field_validator("tool_choice")
    @classmethod
    def _not_forced(cls, value: Any) -> Any:
        if value not in (None, "auto", "none"):
            raise ValueError("a call cannot be forced here, calls come back as text; 'auto' and 'none' are served")
        return value

    @field_validator("functions", "function_call")
    @classmethod
    def _outdated(cls, value: Any) -> None:
        if value is not None:
            raise ValueError("this outdated form is not served; tools and tool_choice are")

    @field_validator("parallel_tool_calls")
    @classmethod
    def _any_number(cls, value: bool | None, others: ValidationInfo) -> bool | None:
        if value is False and others.data.get("tools") and others.data.get("tool_choice") != "none":
            raise ValueError("the number of calls cannot be bounded here; leave it out, or true")
        return value

    @property
    def shown_tools(self) -> list[dict[str, Any]] | None:
        """What the template is told of tools, as the client sent it; None where there is nothing to tell."""
        if not self.tools or self.tool_choice == "none":
            return None
        return [tool._sent for tool in self.tools]

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Generation):
    prompt: str | list[int] | list[str]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = False
    suffix: str | None = Field(None, description="not served: a text is continued at its end alone")
    best_of: int | None = Field(None, description="not served beyond n: all answers are sent")

    @model_validator(mode="after")
    def _served(self) -> CompletionRequest:
        if self.echo:
            raise ValueError("echo: not served; the prompt is the client's already")
        if self.suffix:
            raise ValueError("suffix: not served; a text is continued at its end alone")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of: not served; n asks for several answers, all of which are sent")
        if isinstance(self.prompt, list) and self.prompt and isinstance(self.prompt[0], str) and len(self.prompt) > 1:
            raise ValueError("prompt: one text or one list of ids a request")
        return self

    @property
    def given(self) -> str | list[int]:
        """The one text, or its ids."""
        if isinstance(self.prompt, list) and self.prompt and isinstance(self.prompt[0], str):
            return self.prompt[0]
        return self.prompt  # type: ignore[return-value]


class EmbeddingRequest(Body):
    model: str = ""
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, description="not served: embeddings have the model's width")

    @field_validator("dimensions")
    @classmethod
    def _whole(cls, value: int | None) -> None:
        if value is not None:
            raise ValueError("not served; embeddings have the model's width, leave it out")

    @property
    def texts(self) -> list[str | list[int]]:
        """One for each embedding: a text, or its ids."""
        if isinstance(self.input, str) or (self.input and isinstance(self.input[0], int)):
            return [self.input]  # type: ignore[list-item]
        return list(self.input)  # type: ignore[arg-type]


# None: a new context stays, one that is appended to or replaced keeps its time.
Expires = Annotated[float | None, Field(gt=0, le=10 * 365 * 86400)]


class ContextRequest(OwnBody):
    name: str
    text: str = Field(min_length=1)
    expires_seconds: Expires = None
    composable: bool = Field(False, description="keep what composing needs: a larger file, and all is read")
    stream: bool = False


class AppendRequest(OwnBody):
    text: str = Field(min_length=1)
    expires_seconds: Expires = None
    stream: bool = False


class ComposeRequest(OwnBody):
    contexts: list[str] = Field(min_length=1, max_length=16)  # the work grows with the square of their number
    recall: bool = Field(False, description="measure what comes back of each, beside reading them as one text")
    expires_seconds: Expires = None


class ForkRequest(OwnBody):
    to: str


class UndoRequest(OwnBody):
    steps: int = Field(1, ge=1)
