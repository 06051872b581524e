"""The routes of the server."""

from __future__ import annotations

import contextlib
import hmac
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio.to_thread
import pydantic
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from m1jax.serve import openapi, pages
from m1jax.serve.backend import Backend
from m1jax.serve.chat import ChatFormat
from m1jax.serve.completion import CompletionFormat
from m1jax.serve.errors import ApiError
from m1jax.serve.job import Job, Served, chat_job, completion_job
from m1jax.serve.limits import read_body
from m1jax.serve.metrics import CONTENT_TYPE, Metrics
from m1jax.serve.schema import ChatRequest, CompletionRequest, GenerationRequest, Health, Model, ModelList, parsed
from m1jax.serve.stream import GONE, EventStream, unless_gone
from m1jax.serve.writing import Writing, streamed, whole

log = logging.getLogger("m1jax.serve")

QUICK = 4096
"""Bytes of a request that takes less time to prepare than another thread takes to hear of it."""


def make_app(backend: Backend, served: Served, api_key: str | None = None) -> ASGIApp:
    """The server as an ASGI application. The backend is started and closed with it."""
    metrics = Metrics(backend)
    handlers = _Handlers(backend, served, metrics)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        backend.start()
        yield
        await anyio.to_thread.run_sync(backend.close)

    app = Starlette(
        routes=[
            Route("/v1/chat/completions", handlers.chat, methods=["POST"]),
            Route("/v1/completions", handlers.completions, methods=["POST"]),
            Route("/v1/models", handlers.models),
            Route("/v1/models/{model:path}", handlers.model),
            Route("/health", handlers.health),
            Route("/metrics", handlers.metrics_text),
            Route("/openapi.json", handlers.openapi),
            *pages.ROUTES,
        ],
        lifespan=lifespan,
        exception_handlers={ApiError: _failed, HTTPException: _http_failed, Exception: _crashed},
    )
    return _Door(app, metrics, api_key)


async def _failed(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response


async def _http_failed(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}.").response


async def _crashed(request: Request, error: Exception) -> Response:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return ApiError(500, "The server made a mistake; its log says which.").response


class _Door:
    """What every request goes through: the key, the count, and what browsers must know of the page."""

    def __init__(self, app: ASGIApp, metrics: Metrics, api_key: str | None):
        self._app, self._metrics, self._key = app, metrics, api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path: str = scope["path"]

        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                self._metrics.requests.labels(_label(path), str(message["status"])).inc()
            await send(message)

        if path.startswith("/v1/") and not self._may_pass(scope):
            await ApiError(401, "This server needs its key: Authorization: Bearer KEY.").response(
                scope, receive, counted
            )
            return
        await self._app(scope, receive, counted)

    def _may_pass(self, scope: Scope) -> bool:
        if self._key is None:
            return True
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        return hmac.compare_digest(given, b"Bearer " + self._key.encode())


def _label(path: str) -> str:
    """A route's name for the metrics: few, whatever clients ask for."""
    known = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics", "/openapi.json")
    return path if path in known else "/v1/models" if path.startswith("/v1/models/") else "other"


class _Handlers:
    def __init__(self, backend: Backend, served: Served, metrics: Metrics):
        self._backend, self._served, self._metrics = backend, served, metrics
        self._openapi = openapi.description()

    async def chat(self, request: Request) -> Response:
        return await self._generate(request, ChatRequest, chat_job, ChatFormat)

    async def completions(self, request: Request) -> Response:
        return await self._generate(request, CompletionRequest, completion_job, CompletionFormat)

    async def models(self, _: Request) -> Response:
        return _json(ModelList(data=[self._model]))

    async def model(self, request: Request) -> Response:
        self._check_model(request.path_params["model"])
        return _json(self._model)

    async def health(self, _: Request) -> Response:
        backend = self._backend
        status = "failed" if not backend.alive else "draining" if backend.draining else "ok"
        health = Health(status=status, running=backend.running, waiting=backend.waiting)
        return _json(health, 200 if status == "ok" else 503)

    async def metrics_text(self, _: Request) -> Response:
        return Response(self._metrics.text(), media_type=CONTENT_TYPE)

    async def openapi(self, _: Request) -> Response:
        return JSONResponse(self._openapi)

    @property
    def _model(self) -> Model:
        served = self._served
        return Model(id=served.name, created=served.created, max_model_len=served.capacity.max_length)

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self._served.name):
            raise ApiError(
                404,
                f"There is no model {name!r:.200} here; the one that is served is {self._served.name!r}.",
                param="model",
                code="model_not_found",
            )

    async def _generate(
        self,
        request: Request,
        kind: type[Any],
        make_job: Callable[[Any, Served], Job],
        form: type[ChatFormat] | type[CompletionFormat],
    ) -> Response:
        start = time.monotonic()
        body = await read_body(request, self._served.limits.body)
        asked: GenerationRequest = parsed(kind, body)
        self._check_model(asked.model)
        if len(body) <= QUICK and not asked.takes_time:
            job = make_job(asked, self._served)
        else:
            job = await anyio.to_thread.run_sync(make_job, asked, self._served)
        shape = form(job, self._served, return_token_ids=asked.return_token_ids, usage_in_stream=asked.usage_in_stream)
        writing = Writing(job, self._served, self._backend, self._metrics, chat=shape.chat, start=start)
        if not asked.stream:
            answer = await unless_gone(whole(writing, shape), request.receive)
            return GONE if answer is None else _json(answer)
        return EventStream(streamed(writing, shape))


def _json(answer: pydantic.BaseModel, status: int = 200) -> Response:
    return Response(answer.model_dump_json(), status, media_type="application/json")
