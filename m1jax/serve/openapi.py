"""The server's own description at /openapi.json."""

from importlib import metadata
from typing import Any

import pydantic.json_schema

from m1jax.serve import schema

_REFERENCE = "#/components/schemas/{model}"
_ERRORS = {
    "400": "the request cannot be served, such as one that exceeds the context",
    "401": "no key, or a wrong one",
    "404": "no such model",
    "413": "the body is too long",
    "422": "a field is missing, unknown or out of range",
    "429": "too many replies are in work",
    "500": "the engine failed",
    "503": "the server is stopping",
}


def description() -> dict[str, Any]:
    """OpenAPI 3.1."""
    kinds = (schema.ChatRequest, schema.CompletionRequest)
    answers = (schema.ChatCompletion, schema.Completion, schema.ModelList, schema.Model, schema.Failure, schema.Health)
    _, schemas = pydantic.json_schema.models_json_schema(
        [*((kind, "validation") for kind in kinds), *((kind, "serialization") for kind in answers)],
        ref_template=_REFERENCE,
    )
    key = [{"key": []}]
    model = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "m1jax serve", "version": metadata.version("m1jax")},
        "paths": {
            "/v1/chat/completions": {
                "post": _posts("chat", "Let the model answer", "ChatRequest", "ChatCompletion") | {"security": key}
            },
            "/v1/completions": {
                "post": _posts("complete", "Continue texts", "CompletionRequest", "Completion") | {"security": key}
            },
            "/v1/models": {"get": _gets("models", "The model that is served", "ModelList", "401") | {"security": key}},
            "/v1/models/{model}": {
                "parameters": [model],
                "get": _gets("model", "A model", "Model", "401", "404") | {"security": key},
            },
            "/health": {"get": _gets("health", "Whether the server takes requests", "Health", "503")},
            "/metrics": {
                "get": {
                    "operationId": "metrics",
                    "summary": "What Prometheus reads",
                    "responses": {"200": {"description": "metrics", "content": {"text/plain": {}}}},
                }
            },
        },
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _gets(name: str, summary: str, answer: str, *errors: str) -> dict[str, Any]:
    failure = "Health" if name == "health" else "Failure"
    return {
        "operationId": name,
        "summary": summary,
        "responses": {
            "200": {"description": "OK", "content": _json(answer)},
            **{status: {"description": _ERRORS[status], "content": _json(failure)} for status in errors},
        },
    }


def _posts(name: str, summary: str, body: str, answer: str) -> dict[str, Any]:
    described = _gets(name, summary, answer, *_ERRORS)
    described["responses"]["200"]["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    return described | {"requestBody": {"required": True, "content": _json(body)}}


def _json(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _REFERENCE.format(model=name)}}}
