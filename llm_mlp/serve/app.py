"""The HTTP side: paths, errors, keys, limits."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial
from importlib.resources import files
from typing import Annotated, Any

import numpy as np
from fastapi import Depends, FastAPI
from fastapi import Request as HTTP
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from llm_mlp.context import Context, ContextError, describe, diff
from llm_mlp.context.store import examine, summary
from llm_mlp.infer import Full, Request
from llm_mlp.serve import answers
from llm_mlp.serve.protocol import (
    AppendRequest,
    ChatRequest,
    CompletionRequest,
    ComposeRequest,
    ContextRequest,
    EmbeddingRequest,
    Expires,
    ForkRequest,
    Generation,
    UndoRequest,
)
from llm_mlp.serve.service import Piece, Prompt, Refused, Service

log = logging.getLogger("llm_mlp.serve")

Receive, Send = Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]
EVENT = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}
EVENTS: dict[str, Any] = {"content": {"text/event-stream": {"schema": EVENT}}}
FILE: dict[str, Any] = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {
        "model": answers.Error,
        "description": "400 cannot be served (`param`: the field), 401 no key, 404 nothing of that name, 405 no such "
        "method, 409 taken or not fitting, 413 too large, 429 busy",
    },
    "5XX": {
        "model": answers.Error,
        "description": "500 failed, 503 not running, 504 over time, 507 no room in the store",
    },
}
KINDS = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def _error(status: int, message: str, field: str | None = None, code: str | None = None) -> JSONResponse:
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    headers = {"Retry-After": "1"} if status == 429 else {"WWW-Authenticate": "Bearer"} if status == 401 else None
    body = {"error": {"message": message, "type": kind, "param": field, "code": code}}
    return JSONResponse(body, status, headers)


class _Limits:
    """Counts a body's bytes as they come, and writes one line a request, without its text."""

    def __init__(self, app: Any, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(
        self, scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]
    ) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        settings = self.service.settings
        file = scope["method"] == "PUT" and scope["path"].endswith("/file")
        limit, size, status, began = settings.max_upload if file else settings.max_body, 0, 0, time.perf_counter()
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        too_large = _error(413, f"the body is larger than {limit:,} bytes", code="body_too_large")

        async def counted() -> Any:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > limit:
                raise HTTPException(413, f"the body is larger than {limit:,} bytes")
            return message

        async def watched(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if declared.isdigit() and int(declared) > limit:
                await too_large(scope, receive, watched)
            else:
                await self.app(scope, counted, watched)
        finally:
            route = scope.get("route")
            path = getattr(route, "path", "other")
            self.service.requests.labels(path, str(status)).inc()
            row = {"path": path, "status": status, "seconds": round(time.perf_counter() - began, 4)}
            log.info("%s", json.dumps(row | scope.get("state", {}).get("facts", {})))


Bearer = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]


def _user(http: HTTP, given: Bearer) -> str:
    """Whose request it is."""
    found = http.app.state.service.user(given.credentials.strip() if given is not None else None)
    if found is None:
        raise Refused(401, "no API key, or a wrong one: Authorization: Bearer KEY", code="invalid_api_key")
    return found


User = Annotated[str, Depends(_user)]


def create_app(service: Service) -> FastAPI:
    """The server's application; starting it starts the engine, stopping it lets what is under way end."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.close, 60)

    app = FastAPI(title="llm-mlp", lifespan=life, docs_url=None, redoc_url=None, responses=ERRORS)
    app.state.service = service
    app.add_middleware(_Limits, service=service)
    for add in (_add_errors, _add_about, _add_writing, _add_contexts, _add_context_tools):
        add(app, service)
    return app


def _add_errors(app: FastAPI, service: Service) -> None:
    """Every refusal in OpenAI's form."""

    @app.exception_handler(Refused)
    async def _(http: HTTP, error: Refused) -> Response:
        return _error(error.status, error.message, error.field, error.code)

    @app.exception_handler(Full)
    async def _(http: HTTP, error: Full) -> Response:
        return _error(429, f"busy: {error}", code="queue_full")

    @app.exception_handler(ContextError)
    async def _(http: HTTP, error: ContextError) -> Response:
        told = service.refusal(error, "context")
        return _error(told.status, told.message, told.field)

    @app.exception_handler(RequestValidationError)
    async def _(http: HTTP, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(x) for x in first["loc"][1:])
        text = first["msg"].removeprefix("Value error, ")
        return _error(400, f"{place}: {text}" if place else text, place or None)

    @app.exception_handler(HTTPException)
    async def _(http: HTTP, error: HTTPException) -> Response:
        return _error(error.status_code, str(error.detail))

    @app.exception_handler(Exception)
    async def _(http: HTTP, error: Exception) -> Response:
        log.error("%s failed: %s: %s", http.url.path, type(error).__name__, error)
        return _error(500, "an error of the server; its log has it")


def _add_about(app: FastAPI, service: Service) -> None:
    """The page, and what tells of the server."""

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(files("llm_mlp.serve").joinpath("page.html").read_text(encoding="utf8"))

    @app.get("/health", response_model=answers.Health)
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready", response_model=answers.Ready)
    async def ready() -> Response:
        if not service.alive:
            return _error(503, "the engine is not running", code="not_ready")
        return JSONResponse({"status": "ready", **service.engine.load, "capacity": service.capacity})

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics(user: User) -> Response:
        text = await asyncio.to_thread(generate_latest, service.registry)
        return PlainTextResponse(text, media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models", response_model=answers.ModelList)
    async def models(user: User) -> dict[str, Any]:
        row = {"id": service.settings.name, "object": "model", "created": 0, "owned_by": "llm-mlp"}
        return {"object": "list", "data": [row]}

    @app.get("/v1/models/{name}", response_model=answers.ModelRow)
    async def model(name: str, user: User) -> dict[str, Any]:
        if name != service.settings.name:
            raise Refused(404, f"model {name!r} does not exist; this is {service.settings.name!r}", "model")
        return (await models(user))["data"][0]


def _add_writing(app: FastAPI, service: Service) -> None:
    """Completions, chats and embeddings."""

    async def answer(
        http: HTTP, body: Generation, user: str, kind: _Kind, text: str | list[int], limit: int | None
    ) -> Response:
        if body.model not in ("", service.settings.name):
            raise Refused(404, f"model {body.model!r} is not served; {service.settings.name!r} is", "model")
        try:
            sampling = body.sampling()
        except ValueError as error:
            raise Refused(400, str(error)) from None
        grammar = await service.grammar(body)
        prompt = await asyncio.to_thread(service.prompt, text, user, body.context)
        service.prompted.labels("cached").inc(prompt.cached)
        service.prompted.labels("read").inc(len(prompt.ids))
        request = Request(
            prompt.ids,
            min(limit or service.settings.max_tokens, service.settings.max_tokens),
            sampling,
            body.seed,
            kind.stop_ids,
            prompt.start,
            kind.alternatives,
            keep=body.save_context is not None,
        )
        n = body.n or 1
        writer = _Writer(service, kind, prompt, body, user)
        writer.facts |= {"ignored": body.ignored} if body.ignored else {}
        http.state.facts = writer.facts
        # An answer that follows a grammar ends by it: a text that is allowed there is no end of a turn.
        stops = body.stops if grammar is not None else kind.stops
        pieces = service.run(request, stops, n, kind.closing, grammar)
        if body.stream:
            # Refusals come with their status, not in the stream; and who leaves the queue is not waited for.
            first = await _unless_gone(http, anext(pieces))
            return StreamingResponse(writer.stream(first, pieces), media_type="text/event-stream")
        return JSONResponse(await _unless_gone(http, writer.whole(pieces, n)))

    @app.post("/v1/chat/completions", response_model=answers.ChatAnswer, responses={200: EVENTS})
    async def chat(body: ChatRequest, http: HTTP, user: User) -> Response:
        ids = await asyncio.to_thread(service.chat_ids, body.messages, body.shown_tools, begin=body.context is None)
        kind = _Chat(service, body.alternatives, [*body.stops, *service.template.stop])
        return await answer(http, body, user, kind, ids, body.max_completion_tokens or body.max_tokens)

    @app.post("/v1/completions", response_model=answers.TextAnswer, responses={200: EVENTS})
    async def completions(body: CompletionRequest, http: HTTP, user: User) -> Response:
        kind = _Completion(service, body.logprobs, body.stops)
        return await answer(http, body, user, kind, body.given, body.max_tokens or 16)

    @app.post("/v1/embeddings", response_model=answers.EmbeddingList)
    async def embeddings(body: EmbeddingRequest, user: User) -> dict[str, Any]:
        if not 1 <= len(body.texts) <= 2048:
            raise Refused(400, "input: 1 to 2,048 texts", "input")
        rows, total = [], 0
        for index, text in enumerate(body.texts):
            ids = await asyncio.to_thread(service.prompt_ids, text)
            if not ids:
                raise Refused(400, f"input {index} is empty", "input")
            total += len(ids)
            vector = await service.embed(ids)
            data: Any = vector.tolist()
            if body.encoding_format == "base64":
                data = base64.b64encode(vector.numpy().astype(np.float32).tobytes()).decode()
            rows.append({"object": "embedding", "index": index, "embedding": data})
        usage = {"prompt_tokens": total, "total_tokens": total}
        return {"object": "list", "data": rows, "model": service.settings.name, "usage": usage}


def _free(service: Service, user: str, name: str, field: str) -> None:
    """Raises `Refused`: a context of that name is there, or it can be none."""
    try:
        there = service.store(user).look(name)
    except ContextError as error:
        raise Refused(400, service.told(str(error)), field) from None
    if there is not None:
        raise Refused(409, f"context {name!r} exists; choose another name", field)


def _row(service: Service, user: str, name: str) -> dict[str, Any]:
    """A stored context, as it is listed."""
    service.known(user, name)
    store = service.store(user)
    return {"object": "context", **summary(store.entry(name), store.manifest(name))}


async def _read_context(
    service: Service, http: HTTP, user: str, name: str, body: ContextRequest | AppendRequest, base: str | None
) -> Response:
    """Read a text into context ``name``, behind context ``base``; as a stream of progress if the body asks for it."""
    if isinstance(body, ContextRequest) and body.composable:
        prompt = Prompt(await asyncio.to_thread(service.prompt_ids, body.text), reason="miss: all of it is read")
        pieces = service.observed(prompt)
    else:
        prompt = await asyncio.to_thread(service.prompt, body.text, user, base)
        if base is not None and prompt.base is not None and prompt.base.transition is not None:
            pieces = service.observed(prompt)  # it stays composable
        else:
            pieces = service.reading(prompt, user, body.name if isinstance(body, ContextRequest) else None)

    async def done(piece: Piece) -> dict[str, Any]:
        def commit() -> None:
            assert piece.final is not None
            # What was found by its text is no parent: the name is a new one.
            parent = prompt.base if base is not None else None
            context = service.reader.wrap(piece.final, parent, piece.transition)
            service.store(user).commit(context, name, expires=_until(body.expires_seconds))
            service.store(user).forget_reading(name)

        await asyncio.to_thread(commit)
        found = await asyncio.to_thread(_row, service, user, name)
        return found | {"cached_tokens": prompt.cached, "cache": prompt.reason}

    async def events(first: Piece) -> AsyncIterator[str]:
        try:
            async for piece in _both(first, pieces):
                yield _event({"read": prompt.cached + piece.read, "tokens": prompt.tokens})
                if piece.final is not None:
                    yield _event(await done(piece))
        except (ContextError, Refused, Full) as error:  # the status has been sent
            told = service.refusal(error) if isinstance(error, ContextError) else error
            yield _event({"error": {"message": str(told)}})
        finally:
            await pieces.aclose()  # type: ignore[attr-defined]
        yield "data: [DONE]\n\n"

    async def whole() -> dict[str, Any]:
        async for piece in pieces:
            if piece.final is not None:
                return await done(piece)
        raise Refused(500, "the reading ended without a state")

    if body.stream:
        # Refusals come with their status, not in the stream.
        first = await _unless_gone(http, anext(pieces))
        return StreamingResponse(events(first), media_type="text/event-stream")
    return JSONResponse(await _unless_gone(http, whole()), 201)


def _add_contexts(app: FastAPI, service: Service) -> None:
    """Contexts: listed, made, shown, continued, taken back, removed."""

    @app.get("/v1/contexts", response_model=answers.ContextList)
    async def contexts(user: User) -> dict[str, Any]:
        def rows() -> list[dict[str, Any]]:
            store = service.store(user)
            known = store.manifests()  # a damaged file has none
            return [{"object": "context", **summary(entry, known.get(entry.id))} for entry in store.entries()]

        return {"object": "list", "data": await asyncio.to_thread(rows), "usage": service.store(user).usage()}

    made: dict[str, Any] = {"status_code": 201, "response_model": answers.ContextRead, "responses": {200: EVENTS}}

    @app.post("/v1/contexts", **made)
    async def create(body: ContextRequest, http: HTTP, user: User) -> Response:
        _free(service, user, body.name, "name")
        return await _read_context(service, http, user, body.name, body, None)

    @app.get("/v1/contexts/{name}", response_model=answers.ContextShown)
    async def show(name: str, user: User) -> dict[str, Any]:
        found = await asyncio.to_thread(_row, service, user, name)
        context = await asyncio.to_thread(service.context, user, name)
        return found | {"detail": await asyncio.to_thread(describe, context, service.model)}

    @app.delete("/v1/contexts/{name}", response_model=answers.ContextRemoved)
    async def remove(name: str, user: User) -> dict[str, Any]:
        service.known(user, name)
        await asyncio.to_thread(service.store(user).remove, name)
        return {"object": "context", "name": name, "deleted": True}

    @app.post("/v1/contexts/{name}/append", **made)
    async def append(name: str, body: AppendRequest, http: HTTP, user: User) -> Response:
        service.known(user, name)
        return await _read_context(service, http, user, name, body, name)

    @app.post("/v1/contexts/{name}/fork", response_model=answers.ContextRow)
    async def fork(name: str, body: ForkRequest, user: User) -> dict[str, Any]:
        service.known(user, name)
        _free(service, user, body.to, "to")
        await asyncio.to_thread(service.store(user).fork, name, body.to)
        return await asyncio.to_thread(_row, service, user, body.to)

    @app.post("/v1/contexts/{name}/undo", response_model=answers.ContextRow)
    async def undo(name: str, body: UndoRequest, http: HTTP, user: User) -> dict[str, Any]:
        service.known(user, name)
        await _unless_gone(http, service.undo(user, name, body.steps))
        return await asyncio.to_thread(_row, service, user, name)


def _add_context_tools(app: FastAPI, service: Service) -> None:
    """Contexts: compared, composed, asked what they recall and what surprised, sent and taken in as files."""
    importing = asyncio.Lock()  # each file is loaded whole, to be checked

    @app.get("/v1/contexts/{name}/diff", response_model=answers.ContextDiff)
    async def differ(name: str, other: str, user: User) -> dict[str, Any]:
        def found() -> dict[str, Any]:
            for each in (name, other):
                service.known(user, each)
            store = service.store(user)
            return diff(store.get(name), store.get(other))  # as they are: of whatever models

        return await asyncio.to_thread(found)

    @app.post("/v1/contexts/{name}/compose", status_code=201, response_model=answers.ContextComposed)
    async def composed(name: str, body: ComposeRequest, http: HTTP, user: User) -> dict[str, Any]:
        _free(service, user, name, "name")

        def parts() -> list[Context]:
            return [service.context(user, each) for each in body.contexts]

        own = await asyncio.to_thread(parts)
        context = await _unless_gone(http, service.compose(own))
        found = await _unless_gone(http, service.recall_composed(own)) if body.recall else None
        await asyncio.to_thread(
            partial(service.store(user).commit, context, name, expires=_until(body.expires_seconds))
        )
        rows = (
            None
            if found is None
            else [{"source": source} | each.report() for source, each in zip(body.contexts, found, strict=True)]
        )
        return await asyncio.to_thread(_row, service, user, name) | {"recall": rows}

    @app.post("/v1/contexts/{name}/recall", response_model=answers.ContextRecall)
    async def recall(name: str, http: HTTP, user: User) -> Any:
        context = await asyncio.to_thread(service.context, user, name)
        return (await _unless_gone(http, service.recall(context))).report()

    @app.post("/v1/contexts/{name}/surprise", response_model=answers.ContextSurprise)
    async def surprise(name: str, http: HTTP, user: User) -> Any:
        context = await asyncio.to_thread(service.context, user, name)
        return (await _unless_gone(http, service.surprise(context))).report()

    @app.get("/v1/contexts/{name}/file", response_class=StreamingResponse, responses={200: {"content": FILE}})
    async def export(name: str, user: User) -> Response:
        service.known(user, name)
        file, id_ = await asyncio.to_thread(service.store(user).open, name)

        def pieces() -> Iterator[bytes]:
            with file:
                while piece := file.read(2**20):
                    yield piece

        headers = {
            "Content-Length": str(os.fstat(file.fileno()).st_size),
            "Content-Disposition": f'attachment; filename="{name}.safetensors"',
            "ETag": f'"{id_}"',
        }
        return StreamingResponse(pieces(), media_type="application/octet-stream", headers=headers)

    @app.put(
        "/v1/contexts/{name}/file",
        status_code=201,
        response_model=answers.ContextRow,
        openapi_extra={"requestBody": {"required": True, "content": FILE}},
    )
    async def import_(
        name: str, http: HTTP, user: User, replace: bool = False, expires_seconds: Expires = None
    ) -> dict[str, Any]:
        store = service.store(user)
        try:
            store.look(name)
        except ContextError as error:
            raise Refused(400, service.told(str(error)), "name") from None
        with store.incoming() as file:
            try:
                async for piece in http.stream():
                    await asyncio.to_thread(file.write, piece)
                await asyncio.to_thread(file.flush)
            except ClientDisconnect:
                raise Refused(499, "the client has gone") from None

            def take() -> None:
                try:
                    context = examine(file.name, service.reader)
                except ContextError as error:  # without where it lies here
                    raise Refused(400, str(error).replace(file.name, "the file"), "file") from None
                store.take(context, name, replace=replace, expires=_until(expires_seconds))

            async with importing:
                await asyncio.to_thread(take)
        return await asyncio.to_thread(_row, service, user, name)


async def _unless_gone(http: HTTP, work: Any) -> Any:
    """What ``work`` gives; cancelled when the client goes away."""

    async def result() -> Any:
        return await work

    task = asyncio.ensure_future(result())

    async def gone() -> None:
        while not await http.is_disconnected():
            await asyncio.sleep(0.2)

    watcher = asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Refused(499, "the client has gone")
        return task.result()
    finally:
        for each in (task, watcher):
            each.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _both(first: Piece, pieces: AsyncIterator[Piece]) -> AsyncIterator[Piece]:
    """A piece that was waited for, and those after it."""
    yield first
    async for piece in pieces:
        yield piece


def _until(seconds: float | None) -> timedelta | None:
    return None if seconds is None else timedelta(seconds=seconds)


def _event(row: dict[str, Any]) -> str:
    return f"data: {json.dumps(row, ensure_ascii=False)}\n\n"


# -- the two forms of an answer -------------------------------------------------------------------------------------


class _Kind:
    """What differs between the two ways of writing."""

    prefix: str
    objects: tuple[str, str]  # of a whole answer and of a piece

    def __init__(self, service: Service, alternatives: int | None, stops: list[str]) -> None:
        self.service, self.alternatives, self.stops = service, alternatives, stops
        self.stop_ids = frozenset([service.tokenizer.eos])
        self.closing: list[int] = []  # what a stored answer ends with, so that the next turn can stand behind it

    def spelled(self, token: int) -> tuple[str, list[int]]:
        spelling = self.service.tokenizer.spelling(token)
        return spelling.decode("utf8", "replace"), list(spelling)

    def piece(self, index: int, text: str, first: bool, finish: str | None, logprobs: Any) -> dict[str, Any]:
        raise NotImplementedError("_Kind.piece")  # an abstract method

    def whole(self, index: int, text: str, finish: str | None, logprobs: Any) -> dict[str, Any]:
        raise NotImplementedError("_Kind.whole")  # an abstract method

    def logprobs(self, tokens: list[tuple[int, float, tuple[tuple[int, float], ...]]], offset: int) -> Any:
        raise NotImplementedError("_Kind.logprobs")  # an abstract method


class _Chat(_Kind):
    prefix, objects = "chatcmpl-", ("chat.completion", "chat.completion.chunk")

    def __init__(self, service: Service, alternatives: int | None, stops: list[str]) -> None:
        super().__init__(service, alternatives, stops)
        self.stop_ids, self.closing = service.template.stop_ids, service.template.closing

    def piece(self, index: int, text: str, first: bool, finish: str | None, logprobs: Any) -> dict[str, Any]:
        delta: dict[str, Any] = {"role": "assistant"} if first else {}
        if text or first:
            delta["content"] = text
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def whole(self, index: int, text: str, finish: str | None, logprobs: Any) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish}

    def logprobs(self, tokens: list[tuple[int, float, tuple[tuple[int, float], ...]]], offset: int) -> Any:
        if self.alternatives is None:
            return None

        def row(token: int, value: float) -> dict[str, Any]:
            text, raw = self.spelled(token)
            return {"token": text, "logprob": value, "bytes": raw}

        rows = [row(t, p) | {"top_logprobs": [row(*pair) for pair in top]} for t, p, top in tokens]
        return {"content": rows, "refusal": None}


class _Completion(_Kind):
    prefix, objects = "cmpl-", ("text_completion", "text_completion")

    def piece(self, index: int, text: str, first: bool, finish: str | None, logprobs: Any) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def whole(self, index: int, text: str, finish: str | None, logprobs: Any) -> dict[str, Any]:
        return self.piece(index, text, False, finish, logprobs)

    def logprobs(self, tokens: list[tuple[int, float, tuple[tuple[int, float], ...]]], offset: int) -> Any:
        if self.alternatives is None:
            return None
        texts = [self.spelled(t)[0] for t, _, _ in tokens]
        offsets = [offset + sum(map(len, texts[:i])) for i in range(len(texts))]
        tops = [{self.spelled(t)[0]: p for t, p in top} for _, _, top in tokens]
        return {
            "tokens": texts,
            "token_logprobs": [p for _, p, _ in tokens],
            "top_logprobs": tops,
            "text_offset": offsets,
        }


class _Writer:
    """Pieces to a client's form, and what was used."""

    def __init__(self, service: Service, kind: _Kind, prompt: Prompt, body: Generation, user: str) -> None:
        self.service, self.kind, self.prompt, self.body, self.user = service, kind, prompt, body, user
        self.head: dict[str, Any] = {
            "id": kind.prefix + uuid.uuid4().hex,
            "created": int(time.time()),
            "model": service.settings.name,
        }
        self.tokens, self.joules = 0, 0.0
        self.facts = {"id": self.head["id"], "prompt_tokens": prompt.tokens, "cached_tokens": prompt.cached}
        self.facts |= {"user": user, "cache": prompt.reason.partition(":")[0], "energy_joules": None}

    def count(self, piece: Piece) -> None:
        """What a piece adds to what was used."""
        self.tokens += len(piece.tokens)
        self.joules += piece.joules or 0.0
        # Nothing runs without energy: where none was told, nobody knows.
        self.facts |= {"completion_tokens": self.tokens, "energy_joules": round(self.joules, 6) or None}

    @property
    def usage(self) -> dict[str, Any]:
        read = self.prompt.tokens
        return {
            "prompt_tokens": read,
            "completion_tokens": self.tokens,
            "total_tokens": read + self.tokens,
            "prompt_tokens_details": {"cached_tokens": self.prompt.cached, "cache": self.prompt.reason},
            "energy_joules": self.facts["energy_joules"],
        }

    async def _saved(self, piece: Piece) -> dict[str, Any] | None:
        name = self.body.save_context
        if name is None or piece.final is None:
            return None
        base = self.prompt.base if self.body.context is not None else None
        return await asyncio.to_thread(self.service.save, self.user, name, piece.final, base)

    async def stream(self, first: Piece, pieces: AsyncIterator[Piece]) -> AsyncIterator[str]:
        begun: set[int] = set()
        offsets: dict[int, int] = {}
        head = {**self.head, "object": self.kind.objects[1]}

        try:
            async for piece in _both(first, pieces):
                self.count(piece)
                saved = await self._saved(piece)
                if not piece.text and piece.finish is None and (self.kind.alternatives is None or not piece.tokens):
                    continue
                logprobs = self.kind.logprobs(piece.tokens, offsets.get(piece.index, 0))
                offsets[piece.index] = offsets.get(piece.index, 0) + len(piece.text)
                new = piece.index not in begun
                begun.add(piece.index)
                row = {**head, "choices": [self.kind.piece(piece.index, piece.text, new, piece.finish, logprobs)]}
                yield _event(row | ({"context": saved} if saved else {}))
            if self.body.usage_in_stream:
                yield _event({**head, "choices": [], "usage": self.usage})
            yield "data: [DONE]\n\n"
        except (Refused, Full) as error:  # the status has been sent
            yield _event({"error": {"message": str(error), "type": "server_error"}})
        finally:
            await pieces.aclose()  # type: ignore[attr-defined]

    async def whole(self, pieces: AsyncIterator[Piece], n: int) -> dict[str, Any]:
        texts, finish = [""] * n, [""] * n
        tokens: list[list] = [[] for _ in range(n)]
        saved = None
        try:
            async for piece in pieces:
                texts[piece.index] += piece.text
                tokens[piece.index] += piece.tokens
                self.count(piece)
                if piece.finish is not None:
                    finish[piece.index] = piece.finish
                saved = await self._saved(piece) or saved
        finally:
            await pieces.aclose()  # type: ignore[attr-defined]
        choices = [self.kind.whole(i, texts[i], finish[i], self.kind.logprobs(tokens[i], 0)) for i in range(n)]
        found = {**self.head, "object": self.kind.objects[0], "choices": choices, "usage": self.usage}
        return found | {"context": saved}
