"""What all paths share: whose request it is, errors in OpenAI's form, events, clients that go away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import Depends
from fastapi import Request as HTTP
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from llm_mlp.serve.service import Piece, Refused

EVENT = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}
EVENTS: dict[str, Any] = {"content": {"text/event-stream": {"schema": EVENT}}}
KINDS = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def error_detail(error: Refused) -> dict[str, Any]:
    """What is told of a refusal, in OpenAI's form."""
    kind = KINDS.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"message": error.message, "type": kind, "param": error.field, "code": error.code}


def error_answer(error: Refused) -> JSONResponse:
    """The answer of a request that is refused."""
    status = error.status
    headers = {"Retry-After": "1"} if status == 429 else {"WWW-Authenticate": "Bearer"} if status == 401 else None
    return JSONResponse({"error": error_detail(error)}, status, headers)


Bearer = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]


def _user(http: HTTP, given: Bearer) -> str:
    """Whose request it is."""
    found = http.app.state.service.user(given.credentials.strip() if given is not None else None)
    if found is None:
        raise Refused(401, "no API key, or a wrong one: Authorization: Bearer KEY", code="invalid_api_key")
    return found


User = Annotated[str, Depends(_user)]


async def unless_gone(http: HTTP, work: Any) -> Any:
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


async def both(first: Piece, pieces: AsyncIterator[Piece]) -> AsyncIterator[Piece]:
    """A piece that was waited for, and those after it."""
    yield first
    async for piece in pieces:
        yield piece


def event(row: dict[str, Any]) -> str:
    """An event of a stream."""
    return f"data: {json.dumps(row, ensure_ascii=False)}\n\n"
