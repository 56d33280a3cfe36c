"""`llm-mlp serve`."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated

import typer

from llm_mlp.cli.options import Device, Kept, ModelDir, StoreDir, Threads, Weights

LOOPBACK = ("127.0.0.1", "::1", "localhost")
KEYS = "LLM_MLP_API_KEYS"


def read_keys(file: Path | None) -> tuple[str, ...]:
    """API keys: one a line (# begins a comment), else those in ``$LLM_MLP_API_KEYS``, comma-separated."""
    from llm_mlp.config import ConfigError

    if file is None:
        return tuple(k for part in os.environ.get(KEYS, "").split(",") if (k := part.strip()))
    try:
        lines = file.read_text(encoding="utf8").splitlines()
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--api-keys {file}: cannot be read ({error})") from None
    keys = tuple(k for line in lines if (k := line.partition("#")[0].strip()))
    if not keys:
        raise ConfigError(f"--api-keys {file}: holds no key; one a line")
    return keys


def serve(
    model: ModelDir,
    host: Annotated[str, typer.Option(help="Address; others than this machine's own need API keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    name: Annotated[str, typer.Option(help="Of the model in answers; nothing: its folder's.")] = "",
    api_keys: Annotated[
        Path | None, typer.Option(help="File with one API key a line; else $LLM_MLP_API_KEYS.", show_default=False)
    ] = None,
    slots: Annotated[int, typer.Option(min=1, help="Requests that run at a time.")] = 16,
    memory_gb: Annotated[
        float,
        typer.Option(min=0, help="For running and stored states; fewer slots where they do not fit. 0: any."),
    ] = 0.0,
    chunk: Annotated[int, typer.Option(min=1, help="Prompt tokens read at most between two decoding steps.")] = 512,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait; more get 429.")] = 256,
    max_tokens: Annotated[int, typer.Option(min=1, help="A request writes at most.")] = 4096,
    max_prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt at most.")] = 10_000_000,
    max_body_mb: Annotated[float, typer.Option(min=0.001, help="Of a request's body.")] = 32.0,
    max_upload_mb: Annotated[float, typer.Option(min=0.001, help="Of a context's file that is imported.")] = 2048.0,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds a request may take.")] = 600.0,
    invariant: Annotated[
        bool, typer.Option("--invariant", help="Answers do not depend, to the bit, on what else runs (slower).")
    ] = False,
    store: StoreDir = None,
    store_gb: Annotated[
        float, typer.Option(min=0.001, help="Of stored contexts on disk, of each API key's; older versions go first.")
    ] = 50.0,
    weights: Weights = "fp32",
    kept: Kept = "auto",
    threads: Threads = 0,
    device: Device = "auto",
) -> None:
    """Serve a model over HTTP: OpenAI's API, contexts, metrics, and a page to chat on."""
    from llm_mlp.allocator import keep_freed_memory
    from llm_mlp.checkpoint import load_model, resolve
    from llm_mlp.config import ConfigError
    from llm_mlp.device import pick_device

    try:
        import torch
        import uvicorn

        from llm_mlp.data.chat import ChatError, ChatTemplate
        from llm_mlp.serve import Service, Settings, create_app
    except ImportError as error:
        raise ConfigError(f"serving needs {error.name}: pip install 'llm-mlp[serve]'") from None
    keys = read_keys(api_keys)
    if not keys and host not in LOOPBACK:
        raise ConfigError(
            f"--host {host}: without API keys only this machine is served (127.0.0.1); give --api-keys FILE or ${KEYS}"
        )
    if threads:
        torch.set_num_threads(threads)
    logging.getLogger("llm_mlp").setLevel(logging.INFO)
    keep_freed_memory()
    lm, tokenizer = load_model(model, device=pick_device(device), weights=weights, state=kept)
    try:
        template = ChatTemplate(tokenizer)
    except ChatError as error:
        raise ConfigError(str(error)) from None
    folder = resolve(model).absolute()
    settings = Settings(
        name=name or (folder.parent if folder.name == "model" else folder).name,
        keys=keys,
        slots=slots,
        chunk=chunk,
        queue=queue,
        invariant=invariant,
        memory=int(memory_gb * 2**30) or None,
        store=store,
        store_bytes=int(store_gb * 2**30),
        max_tokens=max_tokens,
        max_prompt=max_prompt,
        max_body=int(max_body_mb * 2**20),
        max_upload=int(max_upload_mb * 2**20),
        timeout=timeout,
    )
    try:
        service = Service(lm, tokenizer, template, settings)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    typer.echo(f"{settings.name}: {service.capacity}", err=True)
    config = uvicorn.Config(
        create_app(service),
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=60,
    )

    class Server(uvicorn.Server):
        async def startup(self, sockets: list | None = None) -> None:
            await super().startup(sockets)
            for one in self.servers:
                own = one.sockets[0].getsockname()
                typer.echo(f"listening on http://{host}:{own[1]}", err=True)

    Server(config).run()
