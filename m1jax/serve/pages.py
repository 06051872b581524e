"""The page at /, and the frame in which HTML that a model wrote runs.

That frame is sandboxed by the page and by its own policy: scripts run, in an origin of their own, and reach nothing.
The page's policy keeps the frame where it is: it could otherwise go to another address, and tell it something.
"""

from pathlib import Path

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

DIRECTORY = Path(__file__).parent / "page"
_PAGE = (
    "default-src 'self'; img-src 'self' data:; frame-src 'self'; frame-ancestors 'none'; base-uri 'none'; "
    "form-action 'none'"
)
_FRAME = (
    "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; "
    "img-src data: blob:; font-src data:; media-src data: blob:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'self'"
)
_ALWAYS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-DNS-Prefetch-Control": "off",
    "Cache-Control": "no-cache",
}


class _Files(StaticFiles):
    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(_headers(path))
        return response


def _headers(path: str) -> Headers:
    return Headers({**_ALWAYS, "Content-Security-Policy": _FRAME if path == "preview.html" else _PAGE})


async def _index(_: Request) -> Response:
    return FileResponse(DIRECTORY / "index.html", headers=dict(_headers("index.html")))


ROUTES = [Route("/", _index), Mount("/page", _Files(directory=DIRECTORY))]
