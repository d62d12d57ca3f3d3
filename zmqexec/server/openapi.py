"""/openapi.json, made from the request Structs, so that it says what the server reads.

Runs in: server.
"""

from __future__ import annotations

import functools
from typing import Any

import msgspec

from zmqexec.server.openai import REQUESTS, ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from zmqexec.version import __version__

POSTS = {
    "/v1/chat/completions": (ChatRequest, "Complete a chat; with `stream`, as server-sent events"),
    "/v1/completions": (CompletionRequest, "Complete one or several prompts; with `stream`, as server-sent events"),
    "/tokenize": (TokenizeRequest, "Token ids of a prompt or a chat"),
    "/detokenize": (DetokenizeRequest, "Text of token ids"),
}
GETS = {
    "/v1/models": "The model that is served",
    "/health": "200 while the engine can work, 503 once it cannot",
    "/ping": "The same as /health",
    "/metrics": "Prometheus metrics",
    "/version": "The version of the server",
    "/openapi.json": "This document",
}
NOT_JSON = {"/health", "/ping", "/metrics"}
ERROR = {"description": "The error, in OpenAI's shape", "content": {"application/json": {"schema": {"type": "object"}}}}


@functools.cache
def openapi_document() -> dict[str, Any]:
    """The OpenAPI 3.1 document of the routes."""
    _, components = msgspec.json.schema_components(REQUESTS, ref_template="#/components/schemas/{name}")
    paths: dict[str, dict[str, Any]] = {}
    for path, (struct, summary) in POSTS.items():
        schema = {"$ref": f"#/components/schemas/{struct.__name__}"}
        paths[path] = {
            "post": {
                "summary": summary,
                "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
                "responses": {"200": _ok(path), "400": ERROR, "404": ERROR, "413": ERROR, "500": ERROR, "503": ERROR},
            }
        }
    for path, summary in GETS.items():
        responses = {"200": _ok(path)} | ({"503": {"description": "The engine is dead"}} if path in NOT_JSON else {})
        paths[path] = {"get": {"summary": summary, "responses": responses}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "zmqexec", "version": __version__},
        "paths": paths,
        "components": {"schemas": components},
    }


def _ok(path: str) -> dict[str, Any]:
    if path in NOT_JSON:
        return {"description": "ok"}
    content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if path.startswith("/v1/") and path in POSTS:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    return {"description": "ok", "content": content}
