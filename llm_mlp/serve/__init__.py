"""An OpenAI-compatible server over the engine: `create_app`, and what it is told in `Settings`."""

from llm_mlp.serve.app import create_app
from llm_mlp.serve.service import Service, Settings

__all__ = ["Service", "Settings", "create_app"]
