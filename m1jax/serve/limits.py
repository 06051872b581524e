"""How much a client may ask for."""

import dataclasses

from starlette.requests import ClientDisconnect, Request

from m1jax.errors import require_positive
from m1jax.serve.errors import ApiError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Raises UserError for one that is not positive."""

    body: int = 32 * 2**20
    """bytes of a request"""
    new_tokens: int = 81_920
    """of a reply; also of one whose request does not say"""
    queue: int = 256
    """replies that wait for a row of the engine"""
    seconds: float = 3600.0
    """from a request to the end of its reply, which is cut there"""

    def __post_init__(self) -> None:
        require_positive(self, "body", "new_tokens", "seconds")
        require_positive(self, "queue", zero=True)


async def read_body(request: Request, most: int) -> bytes:
    """The body of a request; raises ApiError 413 as soon as it is too long."""
    if (length := request.headers.get("content-length", "")).isdigit() and int(length) > most:
        raise ApiError(413, f"The request has {length} bytes; at most {most} are taken.")
    body = bytearray()
    try:
        async for piece in request.stream():
            body += piece
            if len(body) > most:
                raise ApiError(413, f"The request has more than {most} bytes, which is the most that is taken.")
    except ClientDisconnect as error:
        raise ApiError(400, "The client left before its request was read.") from error
    return bytes(body)
