"""The HTTP side: paths, errors, keys, limits."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

import numpy as np
from fastapi import FastAPI
from fastapi import Request as HTTP
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from llm_mlp.infer import Request
from llm_mlp.serve import answers
from llm_mlp.serve.context_paths import add_context_paths
from llm_mlp.serve.http import EVENTS, User, error_answer, unless_gone
from llm_mlp.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    Generation,
)
from llm_mlp.serve.service import UNSERVED, Refused, Service
from llm_mlp.serve.writing import Chat, Completion, Kind, Writer

log = logging.getLogger("llm_mlp.serve")

Receive, Send = Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {
        "model": answers.Error,
        "description": "400 cannot be served (`param`: the field), 401 no key, 404 nothing of that name, 405 no such "
        "method, 409 taken or not fitting, 413 too large, 429 busy",
    },
    "5XX": {
        "model": answers.Error,
        "description": "500 failed, 503 the engine has failed or is closing, 504 over time, 507 no room in the store",
    },
}


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
        too_large = error_answer(Refused(413, f"the body is larger than {limit:,} bytes", code="body_too_large"))

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
    for add in (_add_errors, _add_about, _add_writing, add_context_paths):
        add(app, service)
    return app


def _add_errors(app: FastAPI, service: Service) -> None:
    """Every refusal in OpenAI's form."""

    async def refuse(http: HTTP, error: Exception) -> Response:
        return error_answer(service.refusal(error))

    for kind in UNSERVED:
        app.add_exception_handler(kind, refuse)

    @app.exception_handler(RequestValidationError)
    async def _(http: HTTP, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(x) for x in first["loc"][1:])
        text = first["msg"].removeprefix("Value error, ")
        return error_answer(Refused(400, f"{place}: {text}" if place else text, place or None))

    @app.exception_handler(HTTPException)
    async def _(http: HTTP, error: HTTPException) -> Response:
        return error_answer(Refused(error.status_code, str(error.detail)))

    @app.exception_handler(Exception)
    async def _(http: HTTP, error: Exception) -> Response:
        log.error("%s failed: %s: %s", http.url.path, type(error).__name__, error)
        return error_answer(Refused(500, "an error of the server; its log has it"))


def _add_about(app: FastAPI, service: Service) -> None:
    """The page, and what tells of the server."""

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(files("llm_mlp.serve").joinpath("page.html").read_text(encoding="utf8"))

    @app.get("/health", response_model=answers.Health)
    async def health() -> dict[str, str]:
        if service.engine.failed is not None:
            raise service.engine.stopped()
        return {"status": "ok"}

    @app.get("/ready", response_model=answers.Ready)
    async def ready() -> Response:
        await health()
        if not service.alive:
            raise Refused(503, "the engine is not running", code="not_ready")
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
        http: HTTP, body: Generation, user: str, kind: Kind, text: str | list[int], limit: int | None
    ) -> Response:
        if body.model not in ("", service.settings.name):
            raise Refused(404, f"model {body.model!r} is not served; {service.settings.name!r} is", "model")
        try:
            sampling = body.sampling()
        except ValueError as error:
            raise Refused(400, str(error)) from None
        grammar = await service.grammar(body)
        prompt = await asyncio.to_thread(service.prompt, text, user, body.context)
        if body.save_context is not None:  # before anything is written for it
            service.free(user, body.save_context, "save_context", prompt.base if body.context is not None else None)
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
        n, deadline = body.n or 1, service.deadline()
        writer = Writer(service, kind, prompt, body, user, deadline)
        writer.facts |= {"ignored": body.ignored} if body.ignored else {}
        http.state.facts = writer.facts
        # An answer that follows a grammar ends by it: a text that is allowed there is no end of a turn.
        stops = body.stops if grammar is not None else kind.stops
        pieces = service.run(request, stops, n, grammar, deadline)
        if body.stream:
            # Refusals come with their status, not in the stream; and who leaves the queue is not waited for.
            first = await unless_gone(http, anext(pieces))
            return StreamingResponse(writer.stream(first, pieces), media_type="text/event-stream")
        return JSONResponse(await unless_gone(http, writer.whole(pieces)))

    @app.post("/v1/chat/completions", response_model=answers.ChatAnswer, responses={200: EVENTS})
    async def chat(body: ChatRequest, http: HTTP, user: User) -> Response:
        ids = await asyncio.to_thread(service.chat_ids, body.messages, body.shown_tools, begin=body.context is None)
        kind = Chat(service, body.alternatives, [*body.stops, *service.template.stop])
        return await answer(http, body, user, kind, ids, body.max_completion_tokens or body.max_tokens)

    @app.post("/v1/completions", response_model=answers.TextAnswer, responses={200: EVENTS})
    async def completions(body: CompletionRequest, http: HTTP, user: User) -> Response:
        kind = Completion(service, body.logprobs, body.stops)
        return await answer(http, body, user, kind, body.given, body.max_tokens or 16)

    @app.post("/v1/embeddings", response_model=answers.EmbeddingList)
    async def embeddings(body: EmbeddingRequest, http: HTTP, user: User) -> dict[str, Any]:
        if not 1 <= len(body.texts) <= 2048:
            raise Refused(400, "input: 1 to 2,048 texts", "input")
        rows, total = [], 0
        for index, text in enumerate(body.texts):
            ids = await asyncio.to_thread(service.prompt_ids, text)
            if not ids:
                raise Refused(400, f"input {index} is empty", "input")
            total += len(ids)
            vector = await unless_gone(http, service.embed(ids))
            data: Any = vector.tolist()
            if body.encoding_format == "base64":
                data = base64.b64encode(vector.numpy().astype(np.float32).tobytes()).decode()
            rows.append({"object": "embedding", "index": index, "embedding": data})
        usage = {"prompt_tokens": total, "total_tokens": total}
        return {"object": "list", "data": rows, "model": service.settings.name, "usage": usage}
