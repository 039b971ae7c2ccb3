"""Who acts on the Hub: a sign-in where one is possible, a token typed in for this session, or that of this machine.

A handler that needs the token takes the field as an input and the sign-in by annotation, which gradio fills in itself:

    def push(repository: str, typed: str, oauth_token: gr.OAuthToken | None) -> str:
        secret = secret_of(typed, oauth_token)

    button.click(push, [repository, identity.token], told)

A function of `*inputs` names it first: `def push(oauth_token: gr.OAuthToken | None, *inputs)`. The token is asked for at each call,
since a sign-in expires, and goes into no State, file, event or text.
"""

import inspect
import time
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr
from gradio import oauth
from gradio.utils import get_space

from qlora_core.hub import Probe, acting_as, machine_token, probe
from qlora_core.ui.words import clock, esc

# What gradio gives in place of a token where it only pretends a sign-in.
MOCKED = "mock-oauth-token-for-local-dev"
WHERE = "It is done in “Hugging Face account” at the top."
KNOWN = "data-known"
SIGNED_IN, TYPED, MACHINE = "signed in", "token typed in", "token of this machine"


def secret_of(typed: str | None, oauth_token: gr.OAuthToken | None) -> str | None:
    """The token to act with: what was typed, else that of the sign-in, else that of this machine, which a Space has not."""
    if text := (typed or "").strip():
        return text
    if oauth_token is not None and oauth_token.token != MOCKED:
        return oauth_token.token
    return machine_token()


def acting(handler: Callable[..., Any]) -> Callable[..., Any]:
    """The handler, with the token's field as its first input: what it fetches, it fetches as the person who asks."""

    def whole(signed_in: gr.OAuthToken | None, typed: str, *values: Any) -> Any:
        with acting_as(secret_of(typed, signed_in)):
            return handler(*values)

    def by_steps(signed_in: gr.OAuthToken | None, typed: str, *values: Any) -> Iterator[Any]:
        steps, secret = handler(*values), secret_of(typed, signed_in)
        while True:
            with acting_as(secret):  # not around the yield: gradio takes each step in another context
                try:
                    step = next(steps)
                except StopIteration:
                    return
            yield step

    return by_steps if inspect.isgeneratorfunction(handler) else whole


def scope_of(typed: str | None, oauth_token: gr.OAuthToken | None) -> str | None:
    """What the token of `secret_of` was given, for `probe`; None where only the Hub knows."""
    signed_in = oauth_token is not None and secret_of(typed, oauth_token) == oauth_token.token
    return oauth_token.scope if oauth_token is not None and signed_in else None


def can_sign_in() -> bool:
    """On a Space whose README.md has `hf_oauth: true`. Elsewhere gradio's button would pretend, and not start without a token."""
    told = (oauth.OAUTH_CLIENT_ID, oauth.OAUTH_CLIENT_SECRET, oauth.OAUTH_SCOPES, oauth.OPENID_PROVIDER_URL)
    return get_space() is not None and all(told)


class Identity:
    """Builds the button, the field and the line that says who acts; `token` is an input of every handler that needs one."""

    def __init__(self) -> None:
        with gr.Row(elem_id="identity"):
            with gr.Column(scale=1, min_width=240):
                self.line = gr.HTML("", min_height=28, elem_id="identity-line")
            self.button = None
            if can_sign_in():
                self.button = gr.LoginButton(
                    logout_value="Sign out {}", size="md", elem_id="sign-in", scale=0, min_width=270
                )
        self.token = gr.Textbox(
            label="Or a token, for this session only" if self.button else "Token of the Hub, for this session only",
            type="password",
            max_lines=1,
            placeholder=self._placeholder(),
            info="With write permission. It stays in this field until the page is closed or loaded again, and nowhere else.",
            html_attributes=gr.InputHTMLAttributes(autocomplete="off", spellcheck=False),
            elem_id="identity-token",
        )

    def _placeholder(self) -> str:
        return "not needed when signed in" if self.button else "that of this machine" if machine_token() else "hf_…"

    def connect(self, hidden: dict[str, Any]) -> None:
        """A token is looked at when the field is left, not at each letter of it."""
        gr.on([self.token.blur, self.token.submit], self.show, self.token, self.line, **hidden)

    def on_load(self, demo: gr.Blocks, hidden: dict[str, Any]) -> None:
        demo.load(self.show, self.token, self.line, **hidden)

    def show(self, typed: str, request: gr.Request) -> str:
        """The line. It asks the Hub once, and reads the sign-in itself: of one that has expired, gradio tells a handler nothing."""
        info = _sign_in(request)
        expires = float((info or {}).get("expires_at") or 0)
        signed_in = None
        if info and (not expires or expires > time.time()):
            signed_in = gr.OAuthToken(
                token=info["access_token"], scope=info.get("scope") or "", expires_at=int(expires)
            )
        secret = secret_of(typed, signed_in)
        if secret is None:
            return self._nobody(_name(info), expires) if info else self._nobody()
        found = probe(secret, scope=scope_of(typed, signed_in))
        how = SIGNED_IN if signed_in and secret == signed_in.token else TYPED if (typed or "").strip() else MACHINE
        return line_html(found, how, until=expires if how == SIGNED_IN else found.expires)

    def _nobody(self, name: str | None = None, expired: float | None = None) -> str:
        if name is not None:
            return _warning(f"The sign-in of {name} expired at {clock(expired or 0)}: sign in again, or type a token.")
        ways = "sign in, or type a token" if self.button else "type a token"
        ways += "" if get_space() else ", or set HF_TOKEN where the app is started"
        return _hint(f"Nobody is known to the Hub yet: {ways}.")


def line_html(found: Probe, how: str, *, until: float | None) -> str:
    """Who, by which token, until when, and what may be written; or why the token will not do."""
    problems = "; ".join(problem.removeprefix("account: ") for problem in found.problems)
    if found.account is None:
        return _warning(f"The {'sign-in' if how == SIGNED_IN else how} cannot be used: {problems}.")
    who = f"Signed in as {found.name}" if how == SIGNED_IN else f"{found.name}, by the {how} ({found.kind})"
    who += f", until {clock(until)}" if until else ""
    if problems:
        return _warning(f"{who}: {problems}.")
    return _hint(f"{who}. May write to: {', '.join(found.writable)}.", KNOWN)


def elsewhere(line: str) -> str:
    """The line where there is neither field nor button: with the way to them, unless it is known who acts."""
    return line if KNOWN in line or not line else line + _hint(WHERE)


def _sign_in(request: gr.Request | None) -> dict[str, Any] | None:
    """What gradio keeps of the sign-in, in a cookie of the browser, whether or not it has expired."""
    scope = getattr(getattr(request, "request", None), "scope", None) or {}
    return (scope.get("session") or {}).get("oauth_info")


def _name(info: dict[str, Any]) -> str:
    return str((info.get("userinfo") or {}).get("preferred_username") or "this browser")


def _hint(text: str, mark: str = "") -> str:
    return f'<p class="lab-hint" role="status" {mark}>{esc(text)}</p>'


def _warning(text: str) -> str:
    return f'<p class="lab-warn" role="alert">{esc(text)}</p>'
