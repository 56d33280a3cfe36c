"""What answers hold, for the OpenAPI document; those about contexts are checked against it before they are sent."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = Field(description="the field it is about")
    code: str | None


class Error(BaseModel):
    error: ErrorDetail


class Health(BaseModel):
    status: Literal["ok"]


class Ready(BaseModel):
    status: Literal["ready"]
    waiting: int
    reading: int
    running: int
    free: int
    capacity: str


class ModelRow(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelRow]


class PromptDetails(BaseModel):
    cached_tokens: int
    cache: str = Field(description="what was stored of the prompt, and why no more")


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    energy_joules: float | None = Field(description="its share of the device's; null: unavailable, or too little")


class Choice(BaseModel):
    index: int
    logprobs: dict[str, Any] | None
    finish_reason: str


class TextChoice(Choice):
    text: str


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Choice):
    message: ChatMessage


class SavedContext(BaseModel):
    name: str
    id: str
    tokens: int


class Answer(BaseModel):
    id: str
    created: int
    model: str
    usage: Usage
    context: SavedContext | None = Field(description="what the state was stored as; null: it was not")
    context_error: ErrorDetail | None = Field(description="why save_context failed; the answer is whole all the same")


class TextAnswer(Answer):
    object: Literal["text_completion"]
    choices: list[TextChoice]


class ChatAnswer(Answer):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class Embedding(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class ContextRow(BaseModel):
    object: Literal["context"]
    name: str
    id: str
    tokens: int | None
    created: str
    expires: str | None
    unfinished: bool
    versions: int
    replayed: bool | None
    device: str | None
    weights: str | None


class ContextRead(ContextRow):
    cached_tokens: int
    cache: str


class ContextShown(ContextRow):
    detail: dict[str, Any]


class ContextList(BaseModel):
    object: Literal["list"]
    data: list[ContextRow]
    usage: dict[str, int]


class ContextRemoved(BaseModel):
    object: Literal["context"]
    name: str
    deleted: Literal[True]


class ContextDiff(BaseModel):
    a: str
    b: str
    tokens: list[int] = Field(min_length=2, max_length=2)
    common_tokens: int
    same_weights: bool
    layers: list[dict[str, Any]]


class ContextRecall(BaseModel):
    pairs: int
    found: int
    depths: list[int] = Field(description="tokens from each pair to the end")
    hits: list[bool] = Field(description="of each depth")
    rate: float
    chance: float
    interval: list[float] = Field(min_length=2, max_length=2)
    reach: int | None
    warning: str | None


class LayerSurprise(BaseModel):
    layer: int
    mean: list[float] = Field(description="of each part of the text")


class ContextSurprise(BaseModel):
    ends: list[int] = Field(description="tokens up to the end of each part of the text")
    mean: list[float] = Field(description="of each part, all layers; 0.5 is an empty memory's, less is known")
    layers: list[LayerSurprise]
    seconds: float = Field(description="that reading took")


class SourceRecall(BaseModel):
    source: str
    composed: ContextRecall
    concatenated: ContextRecall = Field(description="of the same documents, read as one text")


class ContextComposed(ContextRow):
    recall: list[SourceRecall] | None = Field(description="of each document, where it was asked for")
