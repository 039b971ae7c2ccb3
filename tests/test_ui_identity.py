"""Who acts on the Hub: which token is taken, what the page says of it, a real sign-in in a browser, and where no token is left."""

import gc
import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gradio as gr
import pytest
from gradio import oauth
from helpers import ROOT
from hub_server import Hub, hub
from oauth_provider import SCOPES, Provider, provider
from playwright.sync_api import Browser, Page, expect
from test_browser import CHROMIUM, SECOND, chromium  # noqa: F401 - a fixture
from test_docs import FRONT_MATTER

from qlora_core.ui.identity import MOCKED, Identity, can_sign_in, scope_of, secret_of

pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
MARK = "SECRETMARKER"
ALICE, READER = f"hf_{MARK}alice", f"hf_{MARK}reader"
# What gradio asks for on a Space, for the frame around it; in these tests it comes to nothing.
FRAME = {"huggingface.co", "fonts.googleapis.com"}
# A page with nothing but an identity and one handler, which makes a repository with whatever token it gets.
APP = """
import hashlib, sys
import gradio as gr
from huggingface_hub import HfApi
from qlora_core import hub
from qlora_core.ui.identity import Identity, scope_of, secret_of
from qlora_core.ui.theme import CSS, theme

HIDDEN = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}

def push(repository: str, typed: str, oauth_token: gr.OAuthToken | None) -> str:
    secret = secret_of(typed, oauth_token)
    if secret is None:
        return "not pushed: no token"
    found = hub.probe(secret, repository, scope=scope_of(typed, oauth_token))
    if found.problems:
        return "not pushed: " + "; ".join(found.problems)
    HfApi(token=secret).create_repo(found.repo_id, private=True)
    return f"made {found.repo_id} with {hashlib.sha256(secret.encode()).hexdigest()}"

with gr.Blocks(title="identity", analytics_enabled=False) as demo:
    identity = Identity()
    repository = gr.Textbox(label="Repository", elem_id="repository")
    button, told = gr.Button("Push"), gr.HTML("", elem_id="told")
    identity.connect(HIDDEN)
    identity.on_load(demo, HIDDEN)
    button.click(push, [repository, identity.token], told, **HIDDEN)
look = {"theme": theme(), "css": CSS, "ssr_mode": False, "pwa": False, "run_history": False}
_, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, **look)
print(url, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True, scope="module")
def loops_of_gradio() -> Iterator[None]:
    """gradio leaves event loops unclosed; they are collected here, where that is known."""
    yield
    gc.collect()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Hub]:
    with hub(tmp_path / "hub") as found:
        found.add_user("alice", organizations={"acme": "write", "readers": "read"})
        found.add_user("bob")
        found.add_token("alice", text=ALICE)
        found.add_token("alice", "read", text=READER)
        yield found


# Which token


def signed_in(token: str = "hf_oauth_x", scope: str = SCOPES) -> gr.OAuthToken:
    return gr.OAuthToken(token=token, scope=scope, expires_at=0)


def test_a_typed_token_goes_before_a_sign_in_and_that_before_the_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_machine")
    monkeypatch.delenv("SPACE_ID", raising=False)
    assert secret_of(" hf_typed ", signed_in()) == "hf_typed" and scope_of("hf_typed", signed_in()) is None
    assert secret_of(" ", signed_in()) == "hf_oauth_x" and scope_of("", signed_in()) == SCOPES
    assert secret_of(None, None) == "hf_machine" and scope_of(None, None) is None


def test_what_gradio_gives_where_it_only_pretends_a_sign_in_is_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPACE_ID", raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_machine")
    assert secret_of("", signed_in(MOCKED)) == "hf_machine" and scope_of("", signed_in(MOCKED)) is None


def test_on_a_space_a_visitor_who_has_not_signed_in_is_not_its_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_owner")
    monkeypatch.setenv("SPACE_ID", "alice/lab")
    assert secret_of("", None) is None and secret_of("", signed_in(MOCKED)) is None
    assert secret_of("", signed_in()) == "hf_oauth_x"


# The button and the line


def built() -> tuple[gr.Blocks, Identity]:
    with gr.Blocks(analytics_enabled=False) as demo:
        return demo, Identity()


@pytest.mark.parametrize(
    ("system", "space", "client", "shown"),
    [("spaces", "a/b", "id", True), ("spaces", "a/b", None, False), ("", "", "id", False), ("", "", None, False)],
)
def test_the_button_stands_only_where_a_sign_in_is_possible(
    system: str, space: str, client: str | None, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere gradio would refuse to start without a token of the machine."""
    for name in ("OAUTH_CLIENT_ID", "OAUTH_CLIENT_SECRET", "OAUTH_SCOPES", "OPENID_PROVIDER_URL"):
        monkeypatch.setattr(oauth, name, client)
    for name, value in {"SYSTEM": system, "SPACE_ID": space}.items():
        monkeypatch.setenv(name, value)
    demo, identity = built()
    assert (can_sign_in(), identity.button is not None, demo.expects_oauth) == (shown, shown, shown)
    assert ("sign in, or type a token" in identity.show("", None)) is shown  # type: ignore[arg-type]
    assert "HF_TOKEN" not in identity.show("", None) or not space  # type: ignore[arg-type]


def test_the_line_says_whose_token_it_is_and_what_it_may_do(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", served.url)
    for name in ("SPACE_ID", "HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("qlora_core.ui.identity.machine_token", lambda: None)
    _, identity = built()
    said = {typed: identity.show(typed, None) for typed in ("", ALICE, READER, f"hf_{MARK}<b>")}  # type: ignore[arg-type]
    assert "Nobody is known to the Hub yet: type a token, or set HF_TOKEN" in said[""]
    assert "alice, by the token typed in (write). May write to: alice, acme." in said[ALICE]
    assert "lab-warn" in said[READER] and "may only read; make one that may write" in said[READER]
    assert (
        "The token typed in cannot be used: the Hub does not accept" in said[f"hf_{MARK}<b>"]
        and "invalid or has expired" in said[f"hf_{MARK}<b>"]
    )
    assert not any(MARK in text for text in said.values())
    monkeypatch.setattr("qlora_core.ui.identity.machine_token", lambda: ALICE)
    assert "alice, by the token of this machine (write)." in identity.show("", None)  # type: ignore[arg-type]


def test_the_space_asks_for_what_a_push_needs_and_for_no_more() -> None:
    scopes = FRONT_MATTER["hf_oauth_scopes"]
    assert FRONT_MATTER["hf_oauth"] is True and f"openid profile {' '.join(scopes)}" == SCOPES


# In a browser


@pytest.fixture
def signing_in(served: Hub) -> Iterator[Provider]:
    with provider(served, mark=MARK) as found:
        yield found


@pytest.fixture
def app(tmp_path: Path, served: Hub, signing_in: Provider) -> Iterator[str]:
    """The page on what looks like a Space, whose own token must not be used; everything that it writes is below `home`."""
    home = tmp_path / "home"
    (home / "tmp").mkdir(parents=True)
    names = {"HOME": str(home), "HF_HOME": str(home / "hf"), "TMPDIR": str(home / "tmp"), "HF_ENDPOINT": served.url}
    names |= {"HF_TOKEN": f"hf_{MARK}owner", "HF_HUB_DISABLE_TELEMETRY": "1", "GRADIO_ANALYTICS_ENABLED": "False"}
    names |= {"GRADIO_TEMP_DIR": str(home / "tmp" / "gradio"), "PYTHONPATH": str(ROOT), **signing_in.environment()}
    with (
        (home / "log.txt").open("w") as log,
        subprocess.Popen(
            [sys.executable, "-c", APP], env=os.environ | names, cwd=home, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
        ) as process,
    ):  # fmt: skip
        try:
            assert process.stdout is not None
            lines = iter(process.stdout.readline, "")
            url = next((line.strip() for line in lines if line.startswith("http")), None)
            assert url, (home / "log.txt").read_text()
            yield url
        finally:
            process.kill()


class Visitor:
    """A browser of one person; notes every address that was asked for and every error of the page."""

    def __init__(self, browser: Browser, url: str) -> None:
        self.context, self.url = browser.new_context(), url
        self.context.route(re.compile(r"^https://"), lambda route: route.abort())
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(60 * SECOND)
        self.asked: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(url)

    @property
    def line(self) -> Any:
        return self.page.locator("#identity-line")

    def sign_in(self, name: str) -> None:
        self.page.locator("#sign-in").click()
        self.page.get_by_role("link", name=f"Continue as {name}").click()
        self.page.wait_for_url(f"{self.url}**")

    def push(self, repository: str) -> str:
        self.page.locator("#repository textarea, #repository input").first.fill(repository)
        self.page.get_by_role("button", name="Push").click()
        told = self.page.locator("#told")
        expect(told).to_contain_text("made" if "/" not in repository else "pushed")
        return told.inner_text()

    def leaves_no_token(self) -> None:
        """Neither in the page as it is now, nor in what the browser keeps for scripts, nor in an address."""
        kept = self.page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])")
        assert MARK not in self.page.content() and MARK not in kept
        assert not [url for url in self.asked if MARK in url] and self.errors == []


def written(home: Path) -> list[str]:
    """Files of the app that hold a token."""
    files = [path for path in home.rglob("*") if path.is_file() and not path.is_symlink()]
    assert home / "log.txt" in files
    return [str(path) for path in files if MARK.encode() in path.read_bytes()]


browser_is_there = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"{CHROMIUM} is missing")


@pytest.mark.browser
@browser_is_there
def test_two_people_sign_in_push_each_as_themselves_and_sign_out(
    chromium: Browser,  # noqa: F811
    app: str,
    served: Hub,
    signing_in: Provider,
    tmp_path: Path,
) -> None:
    alice, bob = Visitor(chromium, app), Visitor(chromium, app)
    expect(alice.line).to_contain_text("Nobody is known to the Hub yet: sign in, or type a token.")
    alice.sign_in("alice")
    expect(alice.line).to_contain_text("Signed in as alice, until")
    expect(alice.line).to_contain_text("May write to: alice, acme.")
    expect(alice.page.locator("#sign-in")).to_contain_text("Sign out alice")
    bob.sign_in("bob")
    expect(bob.line).to_contain_text("Signed in as bob, until")
    digest = {name: hashlib.sha256(tokens[0].encode()).hexdigest() for name, tokens in signing_in.issued.items()}
    assert alice.push("hers") == f"made alice/hers with {digest['alice']}"
    assert bob.push("his") == f"made bob/his with {digest['bob']}"
    assert bob.push("alice/x").startswith("not pushed: repository name 'alice/x': belongs to 'alice'")
    assert {repo_id for _, repo_id in served.repos} == {"alice/hers", "bob/his"}
    alice.page.reload()
    expect(alice.line).to_contain_text("Signed in as alice")
    alice.leaves_no_token()
    alice.page.locator("#sign-in").click()
    expect(alice.line).to_contain_text("Nobody is known to the Hub yet")
    alice.page.locator("#repository textarea, #repository input").first.fill("more")
    alice.page.get_by_role("button", name="Push").click()
    expect(alice.page.locator("#told")).to_have_text("not pushed: no token")
    bob.page.reload()
    expect(bob.line).to_contain_text("Signed in as bob")
    for visitor in (alice, bob):
        visitor.leaves_no_token()
        hosts = {urlsplit(url).netloc for url in visitor.asked} - {""}
        assert hosts - FRAME == {urlsplit(app).netloc, urlsplit(signing_in.url).netloc}
        visitor.context.close()
    assert f"hf_{MARK}owner" not in {(seen.authorization or "").removeprefix("Bearer ") for seen in served.requests}
    assert written(tmp_path / "home") == []


@pytest.mark.browser
@browser_is_there
def test_a_sign_in_that_has_expired_or_was_withdrawn_is_told(
    chromium: Browser,  # noqa: F811
    app: str,
    served: Hub,
    signing_in: Provider,
) -> None:
    visitor = Visitor(chromium, app)
    visitor.sign_in("alice")
    expect(visitor.line).to_contain_text("Signed in as alice")
    served.tokens.pop(signing_in.issued["alice"][0])
    visitor.page.reload()
    expect(visitor.line).to_contain_text("The sign-in cannot be used: the Hub does not accept the token")
    assert "invalid or has expired" in visitor.push("alice/x")
    visitor.page.locator("#sign-in").click()
    expect(visitor.line).to_contain_text("Nobody is known to the Hub yet")
    signing_in.lifetime_seconds = -60
    visitor.sign_in("alice")
    expect(visitor.line).to_contain_text("The sign-in of alice expired at")
    expect(visitor.line).to_contain_text("sign in again, or type a token.")
    assert visitor.push("alice/x") == "not pushed: no token"
    signing_in.lifetime_seconds = 3600
    visitor.sign_in("alice")
    expect(visitor.line).to_contain_text("Signed in as alice")
    visitor.leaves_no_token()
    visitor.context.close()


@pytest.mark.browser
@browser_is_there
def test_a_typed_token_serves_this_page_and_is_gone_when_it_is_loaded_again(
    chromium: Browser,  # noqa: F811
    app: str,
    tmp_path: Path,
) -> None:
    visitor = Visitor(chromium, app)
    field = visitor.page.locator("#identity-token input")
    field.fill(ALICE)
    field.press("Enter")
    expect(visitor.line).to_contain_text("alice, by the token typed in (write). May write to: alice, acme.")
    assert visitor.push("typed").startswith("made alice/typed with")
    visitor.leaves_no_token()
    visitor.sign_in("bob")
    expect(visitor.line).to_contain_text("Signed in as bob")
    assert field.input_value() == "", "a page that is loaded again has no token"
    field.fill(ALICE)
    field.blur()
    expect(visitor.line).to_contain_text("alice, by the token typed in (write)")
    field.fill("")
    field.blur()
    expect(visitor.line).to_contain_text("Signed in as bob")
    visitor.leaves_no_token()
    visitor.context.close()
    assert written(tmp_path / "home") == []
