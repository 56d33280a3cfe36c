"""The paths of contexts."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from functools import partial
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HTTP
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.requests import ClientDisconnect

from llm_mlp.context import Context, ContextError, describe, diff
from llm_mlp.context.store import examine, summary
from llm_mlp.serve import answers
from llm_mlp.serve.http import EVENTS, User, both, error_detail, event, unless_gone
from llm_mlp.serve.protocol import AppendRequest, ComposeRequest, ContextRequest, Expires, ForkRequest, UndoRequest
from llm_mlp.serve.reading import Reading, Readings
from llm_mlp.serve.service import UNSERVED, Piece, Refused, Service

FILE: dict[str, Any] = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}


def add_context_paths(app: FastAPI, service: Service) -> None:
    """All of them."""
    readings = Readings(service)
    _add_contexts(app, service, readings)
    _add_context_tools(app, service, readings)


def _add_contexts(app: FastAPI, service: Service, readings: Readings) -> None:
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
        service.free(user, body.name, "name")
        begin = partial(readings.create, user, body.name, body.text, composable=body.composable)
        return await _read_context(readings, http, body, await asyncio.to_thread(begin))

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
        reading = await asyncio.to_thread(readings.append, user, name, body.text)
        return await _read_context(readings, http, body, reading)

    @app.post("/v1/contexts/{name}/fork", response_model=answers.ContextRow)
    async def fork(name: str, body: ForkRequest, user: User) -> dict[str, Any]:
        service.known(user, name)
        service.free(user, body.to, "to")
        await asyncio.to_thread(service.store(user).fork, name, body.to)
        return await asyncio.to_thread(_row, service, user, body.to)

    @app.post("/v1/contexts/{name}/undo", response_model=answers.ContextRow)
    async def undo(name: str, body: UndoRequest, http: HTTP, user: User) -> dict[str, Any]:
        service.known(user, name)
        await unless_gone(http, readings.undo(user, name, body.steps))
        return await asyncio.to_thread(_row, service, user, name)


def _add_context_tools(app: FastAPI, service: Service, readings: Readings) -> None:
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
        service.free(user, name, "name")

        def parts() -> list[Context]:
            return [service.context(user, each) for each in body.contexts]

        own = await asyncio.to_thread(parts)
        context = await unless_gone(http, readings.compose(own))
        found = await unless_gone(http, readings.recall_composed(user, name, own)) if body.recall else None
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
        return (await unless_gone(http, readings.recall(user, name, context))).report()

    @app.post("/v1/contexts/{name}/surprise", response_model=answers.ContextSurprise)
    async def surprise(name: str, http: HTTP, user: User) -> Any:
        context = await asyncio.to_thread(service.context, user, name)
        return (await unless_gone(http, readings.surprise(context))).report()

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


async def _read_context(
    readings: Readings, http: HTTP, body: ContextRequest | AppendRequest, reading: Reading
) -> Response:
    """Read a text into a context; as a stream of progress if the body asks for it."""
    service, prompt, pieces = readings.service, reading.prompt, readings.pieces(reading)

    async def done(piece: Piece) -> dict[str, Any]:
        await asyncio.to_thread(readings.commit, reading, piece, _until(body.expires_seconds))
        found = await asyncio.to_thread(_row, service, reading.user, reading.name)
        return found | {"cached_tokens": prompt.cached, "cache": prompt.reason}

    async def events(first: Piece) -> AsyncIterator[str]:
        try:
            async for piece in both(first, pieces):
                yield event({"read": prompt.cached + piece.read, "tokens": prompt.tokens})
                if piece.final is not None:
                    yield event(await done(piece))
        except UNSERVED as error:  # the status has been sent
            yield event({"error": error_detail(service.refusal(error))})
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
        first = await unless_gone(http, anext(pieces))
        return StreamingResponse(events(first), media_type="text/event-stream")
    return JSONResponse(await unless_gone(http, whole()), 201)


def _row(service: Service, user: str, name: str) -> dict[str, Any]:
    """A stored context, as it is listed."""
    service.known(user, name)
    store = service.store(user)
    return {"object": "context", **summary(store.entry(name), store.manifest(name))}


def _until(seconds: float | None) -> timedelta | None:
    return None if seconds is None else timedelta(seconds=seconds)
