"""schemathesis against the OpenAPI document: whatever it allows gets an answer that it describes."""

from __future__ import annotations

import contextlib
import itertools
import zlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from serve_cases import TEXT, small_model

from llm_mlp.data.chat import ChatTemplate
from llm_mlp.serve import Service, Settings, create_app

EXAMPLES = 12  # of each operation, as many again that break its schema


def not_started(app):
    """Nothing at a client's start and end: each call makes a client, and an engine starts once."""
    return contextlib.nullcontext()


@pytest.mark.slow
def test_the_document_tells_the_truth(tmp_path):
    schemathesis = pytest.importorskip("schemathesis")
    from schemathesis.checks import not_a_server_error
    from schemathesis.core.failures import FailureGroup
    from schemathesis.specs.openapi import checks

    model, tokenizer = small_model()
    limits = {"max_tokens": 6, "max_prompt": 2000, "max_body": 100_000, "max_upload": 400_000}
    service = Service(model, tokenizer, ChatTemplate(tokenizer), Settings(store=tmp_path, chunk=64, slots=4, **limits))
    app = create_app(service)
    app.router.lifespan_context = not_started
    service.start()
    store, reader = service.store(""), service.reader
    store.commit(reader.create(reader.encode(TEXT[:1000], begin=True)), "kept")
    how = settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    schema, failures, statuses = schemathesis.openapi.from_asgi("/openapi.json", app), [], {}

    def call(case):
        # Names that somebody has, for every other call; made up ones are not found, and nothing is learnt.
        body = case.body if isinstance(case.body, dict) else {}
        if zlib.crc32(repr((case.path_parameters, body)).encode()) % 2:
            if store.look("mill") is None:
                store.fork("kept", "mill")
            case.path_parameters |= {"name": "mill"} if "name" in case.path_parameters else {}
            if "contexts" in body:
                body["contexts"] = ["mill"]
        response = case.call()
        label = case.operation.label
        statuses.setdefault(label, set()).add(response.status_code)
        case.validate_response(
            response,
            checks=[
                not_a_server_error,
                checks.status_code_conformance,
                checks.content_type_conformance,
                checks.response_schema_conformance,
            ],
        )

    try:
        operations = [result.ok() for result in schema.get_all_operations()]
        for operation, mode in itertools.product(operations, schemathesis.GenerationMode):
            try:
                how(given(operation.as_strategy(generation_mode=mode))(call))()
            except Unsatisfiable:  # nothing about it can be wrong
                continue
            except (Exception, FailureGroup) as error:
                failures.append(f"{operation.label}: {error!r}")
    finally:
        service.close(60)
    assert not failures, "\n\n".join(failures)
    assert service.engine.load["free"] == service.engine.slots
    assert len(statuses) >= 20 and sum(any(s < 300 for s in found) for found in statuses.values()) >= 17, statuses
