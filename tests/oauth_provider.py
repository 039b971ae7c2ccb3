"""An OpenID provider on loopback, as the Hub is one for Spaces: a page to sign in on, a code, a signed id_token.

Its access tokens are known to the Hub for tests. What Hugging Face leaves out is left out: no list is in the id_token.
"""

import base64
import html
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from urllib.parse import parse_qs, urlencode

from hub_server import Hub
from joserfc import jwt
from joserfc.jwk import RSAKey
from loopback import serving
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

CLIENT_ID, CLIENT_SECRET = "the-app", "the-apps-secret"
SCOPES = "openid profile contribute-repos gated-repos"


class Provider:
    """`lifetime_seconds` is that of tokens to come, `granted` the organizations that people let the app into, `issued` every
    token so far, by user."""

    def __init__(self, port: int, hub: Hub, mark: str) -> None:
        self.url, self.hub, self.mark = f"http://127.0.0.1:{port}", hub, mark
        self.lifetime_seconds, self.granted = 8 * 3600, ("acme",)
        self.issued: dict[str, list[str]] = {}
        self._key = RSAKey.generate_key(2048, parameters={"kid": "tests", "use": "sig", "alg": "RS256"})
        self._codes: dict[str, tuple[str, dict[str, str]]] = {}  # code -> who, and what the app asked
        self.app = Starlette(
            routes=[
                Route("/.well-known/openid-configuration", self.metadata),
                Route("/oauth/jwks", self.jwks),
                Route("/oauth/authorize", self.authorize),
                Route("/oauth/token", self.token, methods=["POST"]),
            ]
        )

    def environment(self) -> dict[str, str]:
        """What a Space with `hf_oauth: true` gives to its app."""
        names = {"SYSTEM": "spaces", "SPACE_ID": "alice/lab", "OAUTH_CLIENT_ID": CLIENT_ID, "OAUTH_SCOPES": SCOPES}
        return names | {"OAUTH_CLIENT_SECRET": CLIENT_SECRET, "OPENID_PROVIDER_URL": self.url}

    async def metadata(self, request: Request) -> Response:
        places = {f"{name}_endpoint": f"{self.url}/oauth/{path}" for name, path in _PLACES}
        told = {"issuer": self.url, "jwks_uri": f"{self.url}/oauth/jwks", **places}
        told |= {"response_types_supported": ["code"], "subject_types_supported": ["public"]}
        return JSONResponse(told | {"id_token_signing_alg_values_supported": ["RS256"]})

    async def jwks(self, request: Request) -> Response:
        return JSONResponse({"keys": [self._key.as_dict(private=False)]})

    async def authorize(self, request: Request) -> Response:
        """A page with a link for each person: whoever is clicked on has signed in and agreed."""
        asked = dict(request.query_params)
        if asked.get("client_id") != CLIENT_ID or asked.get("response_type") != "code":
            return JSONResponse({"error": "unauthorized_client"}, 400)
        links = []
        for user in self.hub.users:
            code = secrets.token_urlsafe(16)
            self._codes[code] = user, asked
            back = asked["redirect_uri"] + ("&" if "?" in asked["redirect_uri"] else "?")
            target = html.escape(back + urlencode({"code": code, "state": asked["state"]}))
            links.append(f'<a href="{target}">Continue as {user}</a>')
        return HTMLResponse(f"<title>Sign in</title><h1>May the app act for you?</h1>{' '.join(links)}")

    async def token(self, request: Request) -> Response:
        sent = {name: values[0] for name, values in parse_qs((await request.body()).decode()).items()}
        known = base64.b64encode(f"{CLIENT_ID}:{CLIENT_SECRET}".encode()).decode()
        code = self._codes.pop(sent.get("code", ""), None)
        if request.headers.get("authorization") != f"Basic {known}" or code is None:
            return JSONResponse({"error": "invalid_grant"}, 400)
        user, asked = code
        if sent.get("redirect_uri") != asked["redirect_uri"]:
            return JSONResponse({"error": "invalid_grant"}, 400)
        text = self.issue(user, asked["scope"])
        told = {
            "access_token": text,
            "token_type": "bearer",
            "expires_in": self.lifetime_seconds,
            "scope": asked["scope"],
        }
        return JSONResponse(told | {"id_token": self._id_token(user, asked)})

    def issue(self, user: str, scope: str) -> str:
        text = f"hf_oauth_{self.mark}{user}{secrets.token_hex(4)}"
        expires, granted = time.time() + self.lifetime_seconds, self._granted(user)
        self.hub.add_oauth_token(user, scope, granted=granted, expires=expires, text=text)
        self.issued.setdefault(user, []).append(text)
        return text

    def _granted(self, user: str) -> Sequence[str]:
        return [name for name in self.granted if name in self.hub.users[user]]

    def _id_token(self, user: str, asked: dict[str, str]) -> str:
        now = int(time.time())
        claims = {"iss": self.url, "aud": CLIENT_ID, "sub": f"id-of-{user}", "iat": now, "exp": now + 3600}
        claims |= {"nonce": asked.get("nonce", ""), "name": user.title(), "preferred_username": user}
        claims |= {"profile": f"{self.url}/{user}", "picture": f"{self.url}/{user}.png"}
        return jwt.encode({"alg": "RS256", "kid": "tests"}, claims, self._key)


_PLACES = (("authorization", "authorize"), ("token", "token"), ("userinfo", "userinfo"))


@contextmanager
def provider(hub: Hub, *, mark: str) -> Iterator[Provider]:
    """Serves until the block ends; its tokens are of people that the Hub knows, and hold the mark."""
    made: list[Provider] = []

    def make(port: int) -> Starlette:
        made.append(Provider(port, hub, mark))
        return made[0].app

    with serving(make):
        yield made[0]
