"""`m1jax serve`: a model behind OpenAI's protocol, with a page to talk to it."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from m1jax.errors import UserError, require_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Serve a model over HTTP as OpenAI's API does, and with a page at /.

    m1jax serve models/my-model --port 8000
    """

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Directory with config.json, *.safetensors and tokenizer.json: a published model, or one that m1jax saved; or a
    run's directory, whose export is taken."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets others in."""
    port: int = 8000
    """0 takes a free one."""
    api_key: str | None = None
    """What clients must send as their key; without one, everybody may ask."""
    name: str | None = None
    """Of the model, for clients; without one, the directory's."""
    rows: int | None = None
    """Replies that are written at once; without a number, what the device has room for."""
    max_length: int | None = None
    """Longest prompt and reply together, in tokens; without a number, what the model and the device have room for."""
    max_new_tokens: int = 81_920
    """Longest reply, also of requests that do not say."""
    queue: int = 256
    """Replies that may wait for room; more requests are refused (429)."""
    timeout: float = 3600.0
    """Seconds after which a reply is cut."""
    max_body: int = 32 * 2**20
    """Longest request, in bytes."""
    thinking_budget: str | None = None
    """Tokens that a thought may have before it is closed and the answer begins: a number, 40k or 80k."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the computation; auto: float32 on CPU, bfloat16 on GPU and TPU."""


def main(config: Config) -> None:
    """Serves until SIGTERM, after which it ends the replies that it is writing, and returns.

    Raises:
        UserError: the directory holds no model, an option is wrong, the port is in use, or the extra is not installed.
    """
    for name in ("rows", "max_length"):
        if getattr(config, name) is not None:
            require_positive(config, name)
    try:
        import llguidance  # noqa: F401
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f"the server needs {error.name}: pip install 'm1jax[serve]'") from error
    import jax.numpy as jnp

    from m1jax.chat import Tokenizer
    from m1jax.inference.thinking import parse_budget
    from m1jax.serve.app import make_app
    from m1jax.serve.backend import Backend, engines
    from m1jax.serve.grammar import Grammars
    from m1jax.serve.job import Served
    from m1jax.serve.limits import Limits
    from m1jax.serve.server import listen, run
    from m1jax.weights.directory import locate
    from m1jax.weights.pretrained import from_pretrained

    limits = Limits(body=config.max_body, new_tokens=config.max_new_tokens, queue=config.queue, seconds=config.timeout)
    thinking = None if config.thinking_budget is None else parse_budget(config.thinking_budget)
    directory = locate(config.model)
    tokenizer = Tokenizer.from_dir(directory)
    listening = listen(config.host, config.port)
    model = from_pretrained(directory, dtype=None if config.dtype == "auto" else jnp.dtype(config.dtype))
    backend = Backend(engines(model, rows=config.rows, max_length=config.max_length), limits.queue)
    served = Served(
        name=config.name or config.model.resolve().name,
        tokenizer=tokenizer,
        capacity=backend.capacity,
        limits=limits,
        grammars=Grammars(tokenizer, model.config.vocab_size),
        thinking=thinking,
    )
    app = make_app(backend, served, config.api_key)
    host, port = listening.getsockname()[:2]
    place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    print(f"m1jax: {served.name} answers at http://{place}/v1, and on a page at http://{place}/", flush=True)
    run(app, backend, listening)
