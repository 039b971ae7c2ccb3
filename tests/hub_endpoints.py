"""How an endpoint of the Hub for tests is declared: methods, a pattern of the path, a function. Knows no state."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hub_state import Token
from starlette.datastructures import Headers
from starlette.responses import Response


@dataclass(frozen=True)
class Call:
    """A request as a handler needs it; `token` is None for a stranger."""

    method: str
    headers: Headers
    query: Mapping[str, str]
    body: bytes
    token: Token | None

    @property
    def json(self) -> Any:
        return json.loads(self.body)


# (methods, pattern of the path, handler, whether it writes)
ENDPOINTS: list[tuple[list[str], re.Pattern[str], Callable[..., Response], bool]] = []
_REPO = "(?P<owner>[^/]+)/(?P<name>[^/]+)"
_PARTS = {
    "{repo}": "(?P<kind>models|datasets|spaces)/" + _REPO,  # in the API
    "{page}": "(?:(?P<kind>datasets|spaces)/)?" + _REPO,  # elsewhere; a model has no prefix
}


def endpoint(methods: str, path: str, *, write: bool = False) -> Callable[..., Any]:
    """A handler of requests to `path`, where {name} is one quoted segment, {name*} any number of them, and {repo} or {page} a
    repository: that is looked up first, with the rights of who asks, and passed as `repo`."""
    for part, pattern in _PARTS.items():
        path = path.replace(part, pattern)
    path = re.sub(r"\{(\w+)(\*?)\}", lambda m: f"(?P<{m[1]}>{'.+' if m[2] else '[^/]+'})", path)

    def add(handler: Callable[..., Response]) -> Callable[..., Response]:
        ENDPOINTS.append((methods.split(), re.compile(path), handler, write))
        return handler

    return add


def ranged(call: Call, content: bytes, headers: dict[str, str]) -> Response:
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", call.headers.get("range", ""))
    headers |= {"Accept-Ranges": "bytes"}
    if not asked:
        return Response(content, 200, headers)
    start, end = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
    if start > end:
        return Response(None, 416, {**headers, "Content-Range": f"bytes */{len(content)}"})
    return Response(content[start : end + 1], 206, {**headers, "Content-Range": f"bytes {start}-{end}/{len(content)}"})
