"""Every operation of the OpenAPI document with made-up requests, good and bad: never a 5xx, and answers as the document says.

The engine answers with a few tokens at most, so that thousands of requests stay quick.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.server.conftest import ADMIN, KEYS, Running, start
from veneer.engine import Limits

schemathesis = pytest.importorskip("schemathesis")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
OPERATIONS = [
    ("POST", "/v1/chat/completions", 150),
    ("POST", "/v1/completions", 150),
    ("GET", "/v1/models", 5),
    ("GET", "/v1/models/{model}", 30),
    ("GET", "/admin/adapters", 5),
    ("GET", "/admin/adapters/{ref}", 30),
    ("POST", "/admin/adapters/{ref}/load", 40),
    ("POST", "/admin/adapters/{ref}/unload", 40),
    ("POST", "/admin/adapters/{ref}/pin", 40),
    ("GET", "/admin/hot", 5),
    ("POST", "/admin/adapters/{ref}/heat", 20),
    ("POST", "/admin/cool", 5),
    ("POST", "/admin/alias", 40),
    ("POST", "/admin/rollback", 40),
    ("GET", "/admin/keys", 5),
    ("GET", "/admin/usage", 5),
    ("POST", "/v1/load_lora_adapter", 40),
    ("POST", "/v1/unload_lora_adapter", 40),
    ("GET", "/health", 5),
    ("GET", "/ready", 5),
    ("GET", "/metrics", 5),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    made = start(
        tmp_path_factory.mktemp("schemathesis"),
        keys=KEYS,
        engine={"limits": Limits(answer=4)},
        max_tokens=4,
        timeout=5.0,
    )
    yield made
    made.stop()


@pytest.fixture(scope="module")
def document(server: Running) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json", headers={"authorization": f"Bearer {ADMIN}"})


def test_no_operation_is_left_out(document: Any) -> None:
    found = {(result.ok().method.upper(), result.ok().path) for result in document.get_all_operations()}
    assert found == {(method, path) for method, path, _ in OPERATIONS}


# A request without parameters can't be a bad one, and any text may be a name.
CASES = [(m, p, n, "POSITIVE") for m, p, n in OPERATIONS] + [
    (m, p, n, "NEGATIVE") for m, p, n in OPERATIONS if m == "POST" and not p.endswith(("/cool", "/unload", "/heat"))
]


@pytest.mark.parametrize("method,path,examples,mode", CASES)
def test_operation(server: Running, document: Any, method: str, path: str, examples: int, mode: str) -> None:
    operation = document[path][method]
    from schemathesis.specs.openapi import checks as openapi

    checks = [
        schemathesis.checks.not_a_server_error,
        openapi.status_code_conformance,
        openapi.content_type_conformance,
        openapi.response_schema_conformance,
    ]

    @settings(
        max_examples=examples, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode[mode]))
    def ask(case: Any) -> None:
        response = case.call(headers={"authorization": f"Bearer {ADMIN}"})
        case.validate_response(response, checks=checks)

    ask()
    assert server.service.loop.alive
