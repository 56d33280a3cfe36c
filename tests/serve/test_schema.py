"""schemathesis against the OpenAPI document: whatever it allows gets an answer that it describes."""

from __future__ import annotations

import contextlib
import itertools

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from serve_cases import TEXT, small_model

from llm_mlp.data.chat import ChatTemplate
from llm_mlp.serve import Service, Settings, create_app

EXAMPLES = 30  # of each operation, as many again that break its schema


def not_started(app):
    """Nothing at a client's start and end: each call makes a client, and an engine starts once."""
    return contextlib.nullcontext()


@pytest.mark.slow
def test_the_document_tells_the_truth(tmp_path):
    import schemathesis  # here: it takes a second, and the quick tests do without
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
    reader.transitions = True  # so that it can be composed
    kept = reader.create(reader.encode(TEXT[:1500], begin=True))
    store.commit(kept, "kept")
    store.commit(reader.append(kept, reader.encode(" And more.", begin=False)), "kept")  # so that it can be undone
    file, numbers = store.open("kept")[0].read(), itertools.count()
    how = settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    schema, failures, statuses = schemathesis.openapi.from_asgi("/openapi.json", app), [], {}

    def call(case):
        # What exists, for about every other call; made up names are not found, and nothing is learnt.
        path, body, number = case.operation.path, case.body if isinstance(case.body, dict) else {}, next(numbers)
        if number % 2:
            if store.look("mill") is None:
                store.fork("kept", "mill")
            own = {"name": f"n{number}", "to": f"n{number}", "contexts": ["mill"], "model": "", "context": "mill"}
            body.update({field: value for field, value in own.items() if field in body})
            # What the schema cannot say: most messages need a text, and what may be asked of the answer depends.
            for message in body["messages"] if path.endswith("/chat/completions") and valid else []:
                message["content"] = message.get("content") or "Hello."
            for field in ("response_format", "stop", "tools", "tool_choice") if valid else []:
                body.pop(field, None)
            if "name" in (case.path_parameters or {}):
                new = path.endswith(("/compose", "/file")) and case.method in ("POST", "PUT")
                case.path_parameters["name"] = "llm-mlp" if "models" in path else own["name"] if new else "mill"
            if "other" in (case.query or {}):
                case.query["other"] = "kept"
            if case.method == "PUT":
                case.body = file
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
                valid = mode is schemathesis.GenerationMode.POSITIVE
                how(given(operation.as_strategy(generation_mode=mode))(call))()
            except Unsatisfiable:  # nothing about it can be wrong
                continue
            except (Exception, FailureGroup) as error:
                failures.append(f"{operation.label}: {error!r}")
    finally:
        service.close(60)
    assert not failures, "\n\n".join(failures)
    assert service.engine.load["free"] == service.engine.slots
    only_refused = {label: found for label, found in statuses.items() if min(found) >= 300}
    assert len(statuses) >= 20 and not only_refused, only_refused
