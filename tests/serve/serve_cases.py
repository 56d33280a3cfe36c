"""A server of a small random model on a port of this machine, in a thread."""

from __future__ import annotations

import contextlib
import threading
import time

import uvicorn
from model_cases import SMALL

from llm_mlp.config import ModelConfig, _merge, build
from llm_mlp.data.chat import ChatTemplate
from llm_mlp.data.tokenizer import Tokenizer
from llm_mlp.models import build_model
from llm_mlp.serve import Service, Settings, create_app

TEXT = "The mill stood by the river, and the wheel turned all day. " * 40


def small_model(**more):
    tokenizer = Tokenizer.train([TEXT], vocab_size=300)
    config = build(ModelConfig, _merge(SMALL, {"vocab_size": tokenizer.vocab_size, **more}))
    return build_model(config).randomize_().eval(), tokenizer


@contextlib.contextmanager
def serving(store, *, model=None, template=None, energy=None, **settings):
    """(base URL, the service)."""
    lm, tokenizer = model or small_model()
    chunk = settings.pop("chunk", 32)
    template = ChatTemplate(tokenizer.with_chat_template(template))
    service = Service(lm, tokenizer, template, Settings(store=store, chunk=chunk, **settings), energy)
    server = uvicorn.Server(
        uvicorn.Config(create_app(service), port=0, log_level="error", timeout_graceful_shutdown=20)
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}", service
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()
        assert not service.alive
        assert service.engine.load["free"] == service.engine.slots  # nothing has leaked
