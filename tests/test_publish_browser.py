"""Publishing as a person and a script do it, in `python app.py` with a Hub: signed in on a Space, and by a token at home."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
from app_process import AppProcess
from gradio_client import Client
from gradio_client.exceptions import AppError
from helpers import wait_for
from hub_server import HOLD, Hub, hub
from oauth_provider import Provider, provider
from playwright.sync_api import Browser, Locator, Page, expect
from test_browser import CHROMIUM, SECOND, chromium, tab  # noqa: F401 - a fixture
from test_ui_identity import MARK, Visitor
from tiny_models import make_run, train_here

from qlora_core.runs import Run

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"{CHROMIUM} is missing; `apt-get install chromium` brings it"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]
ALICE, OWNER = f"hf_{MARK}alice", f"hf_{MARK}owner"
PROVEN = "✓ Downloaded again and loaded: the logits are equal."
UNKNOWN = "The licence of the dataset is unknown."
NARROW = 390
# What is wider than its place: the text of a button or a label ends in the middle. The card scrolls in a box of its own.
CUT = """() => [...document.querySelectorAll('#push-part :is(button:not(.label-wrap), label, p, li)')]
  .filter((e) => e.offsetParent && !e.closest('#card-preview') && getComputedStyle(e).display !== 'inline')
  .filter((e) => e.scrollWidth > e.clientWidth + 1).map((e) => e.innerText.slice(0, 60))"""


@pytest.fixture(autouse=True, scope="module")
def loops_of_gradio() -> Iterator[None]:
    """gradio's client leaves event loops unclosed; they are collected here, where that is known."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with hub(tmp_path_factory.mktemp("hub")) as found:
        found.add_user("alice", organizations={"acme": "write", "globex": "write"})
        found.add_token("alice", text=ALICE)
        found.add_token("alice", text=OWNER)
        yield found


def trained(folder: Path, name: str, seed: int) -> Run:
    """Of another seed, so that nothing of it is on the Hub already."""
    return train_here(make_run(folder, max_steps=2, eval_steps=2, name=name, seed=seed))


class Publishing:
    """The Publish tab as a person sees it."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.told, self.agree = page.locator("#push-told"), page.locator("#push-agree")

    def open(self) -> "Publishing":
        expect(self.page.locator("#status")).to_contain_text("nothing is running")
        tab(self.page, "Publish")
        expect(self.page.locator("#push-part")).to_be_visible()
        return self

    def open_again(self) -> "Publishing":
        """After a reload: the address says that this tab was open."""
        expect(self.page.locator("#push-part")).to_be_visible()
        return self

    def field(self, name: str) -> Locator:
        return self.page.locator(f"#{name} textarea, #{name} input").first

    def unfold(self, name: str) -> None:
        self.page.locator(f"#{name} > button").click()

    def type_token(self, text: str) -> None:
        self.unfold("account")
        self.field("identity-token").fill(text)
        self.field("identity-token").press("Enter")
        expect(self.page.locator("#push-who")).to_contain_text("alice, by the token typed in (write)")

    def ask(self, repository: str, button: str = "go") -> None:
        self.field("push-repo").fill(repository)
        self.page.locator(f"#push-{button}").click()

    def push(self, repository: str) -> None:
        """An unknown licence needs a look first."""
        self.ask(repository)
        expect(self.told).to_contain_text("What a push would change")
        self.agree.click()

    def write(self, field: str, text: str) -> None:
        self.field(field).fill(text)
        self.field(field).blur()
        expect(self.page.locator("#card-preview")).to_contain_text(text)


# On a Space


@pytest.fixture(scope="module")
def signing_in(served: Hub) -> Iterator[Provider]:
    with provider(served, mark=MARK) as found:
        yield found


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory, served: Hub, signing_in: Provider) -> Iterator[AppProcess]:
    folder = tmp_path_factory.mktemp("space")
    trained(folder, "tickets", 1)
    with AppProcess(folder, served, HF_TOKEN=OWNER, **signing_in.environment()) as app:
        yield app


def test_a_person_signs_in_on_a_space_and_pushes_as_themselves(
    chromium: Browser,  # noqa: F811
    space: AppProcess,
    served: Hub,
    signing_in: Provider,
) -> None:
    visitor = Visitor(chromium, space.url)
    page = Publishing(visitor.page).open()
    expect(page.page.locator("#push-who")).to_contain_text("Nobody is known to the Hub yet: sign in, or type a token.")
    page.ask("tickets")
    expect(page.told).to_contain_text("nobody is known to the Hub; open “Hugging Face account” at the top")
    page.unfold("account")
    visitor.sign_in("alice")
    # The way back from the provider names the run alone.
    expect(visitor.page.get_by_role("tab", name="Runs", exact=True).first).to_have_attribute("aria-selected", "true")
    page.open()
    expect(page.page.locator("#push-who")).to_contain_text("Signed in as alice, until")
    before = len(served.requests)
    page.push("tickets")
    expect(page.told).to_contain_text(PROVEN)
    expect(page.told.get_by_role("link")).to_have_attribute("href", f"{served.url}/alice/tickets")
    expect(page.page.locator("#push-earlier")).to_contain_text("No push of this run so far")  # to any visitor
    repo = served.repo("alice/tickets", "models")
    assert repo.private and repo.by_app and "adapter_model.safetensors" in repo.head.files
    sent = {seen.authorization for seen in served.requests[before:]} - {None}
    assert sent == {f"Bearer {signing_in.issued['alice'][0]}"}, "never by the token of the Space's owner"
    _what_a_sign_in_may_not_do(page, served)
    visitor.leaves_no_token()
    visitor.context.close()
    assert space.written_with(MARK) == []


def _what_a_sign_in_may_not_do(page: Publishing, served: Hub) -> None:
    """Each is answered by what would make it possible, and changes nothing."""
    served.add_repo("alice/theirs", {"README.md": "made by hand"}, kind="models")
    served.add_repo("alice/hidden", {"README.md": "made by hand"}, kind="models", private=True)
    page.field("push-public").check()
    page.ask("alice/theirs")
    expect(page.told).to_contain_text(
        "is there already, and this sign-in reaches only repositories that this app has made"
    )
    expect(page.told).to_contain_text("write-repos")
    page.field("push-public").uncheck()
    page.push("alice/hidden")  # which this sign-in cannot see
    expect(page.told).to_contain_text("there is one of this name that this token cannot see")
    expect(page.told).to_contain_text("with the scope write-repos")
    page.ask("globex/tickets")
    expect(page.told).to_contain_text("globex")
    expect(page.told).to_contain_text("grant")
    page.unfold("push-more")
    page.field("push-pull-request").check()
    page.field("push-collection").fill("My runs")
    page.ask("alice/tickets")
    expect(page.told).to_contain_text("a pull request to it: this sign-in may not do that")
    expect(page.told).to_contain_text("takes the scope write-discussions")
    expect(page.told).to_contain_text("takes the scope write-collections")
    by_hand = [len(served.repo(f"alice/{name}", "models").commits) for name in ("theirs", "hidden")]
    assert by_hand == [2, 2] and ("models", "globex/tickets") not in served.repos


# At home


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, served: Hub) -> Iterator[tuple[AppProcess, Run]]:
    folder = tmp_path_factory.mktemp("home")
    run = trained(folder, "lab", 2)
    with AppProcess(folder, served) as app:
        yield app, run


@pytest.fixture
def page(chromium: Browser, home: tuple[AppProcess, Run]) -> Iterator[Publishing]:  # noqa: F811
    visitor = Visitor(chromium, home[0].url)
    found = Publishing(visitor.page).open()
    yield found
    visitor.leaves_no_token()
    visitor.context.close()


def test_a_push_is_found_again_after_a_reload_and_can_be_cancelled(page: Publishing, served: Hub) -> None:
    page.type_token(ALICE)
    page.ask("alice/slow", "plan")
    expect(page.agree).to_be_visible()
    page.field("push-repo").press("End")
    page.field("push-repo").press_sequentially("er")
    expect(page.agree).to_be_hidden()
    expect(page.told).not_to_contain_text("What a push would change")
    page.page.locator("#push-go").click()
    expect(page.told).to_contain_text("alice/slower: is to be made, private")
    served.once.append(("PUT", "/cdn/", HOLD))
    page.agree.dblclick()
    assert served.holding.wait(60)
    expect(page.told).to_contain_text("Sending")  # the browser keeps a push as soon as it shows it
    page.page.reload()
    page.open_again()
    expect(page.told).to_contain_text("Sending")
    page.page.locator("#push-cancel").click()
    expect(page.told).to_contain_text("Cancelled.")
    assert [commit.title for commit in served.repo("alice/slower", "models").commits] == ["initial commit"]
    expect(page.page.locator("#push-earlier")).to_contain_text("No push of this run so far")


def test_words_stay_and_are_pushed_and_a_version_is_gone_back_to(page: Publishing, served: Hub) -> None:
    page.type_token(ALICE)
    page.unfold("card")
    page.write("card-intended-use", "To sort our own tickets.")
    page.page.reload()
    page.open_again()
    page.unfold("card")
    expect(page.field("card-intended-use")).to_have_value("To sort our own tickets.")
    page.type_token(ALICE)
    page.ask("alice/worded")
    expect(page.agree).to_be_visible()
    page.agree.dblclick()
    expect(page.told).to_contain_text(PROVEN)
    repo = served.repo("alice/worded", "models")
    assert [commit.title for commit in repo.commits[1:]] == [repo.head.title], "a double click is one push"
    assert "To sort our own tickets." in served.read(repo, "README.md").decode()
    page.write("card-intended-use", "To sort the tickets of others.")
    page.push("alice/worded")
    expect(page.told).to_contain_text("version v2")
    page.unfold("versions")
    page.page.locator("#versions-show").click()
    rows = page.page.locator("#versions-table tbody tr")
    expect(rows.nth(0)).to_contain_text("v2 · now")
    expect(rows.nth(0)).to_contain_text("eval loss +0.0000")
    expect(page.page.locator("#versions-go")).to_be_hidden()
    page.page.locator("#versions-look").click()
    expect(page.page.locator("#versions-told")).to_contain_text("Going back to v1 is one new commit that")
    page.page.locator("#versions-go").click()
    expect(page.page.locator("#versions-told")).to_contain_text("Back at v1, commit")
    expect(rows.nth(1)).to_contain_text("v1 · now")
    expect(page.field("versions-version")).to_have_value("v2")
    assert "To sort our own tickets." in served.read(repo, "README.md").decode()
    _nothing_is_cut_on_a_phone(page)


def _nothing_is_cut_on_a_phone(page: Publishing) -> None:
    page.page.set_viewport_size({"width": NARROW, "height": 800})
    page.unfold("push-more")
    page.ask("alice/worded", "plan")
    expect(page.told).to_contain_text("alice/worded")
    assert page.page.evaluate("document.documentElement.scrollWidth") == NARROW
    assert page.page.evaluate(CUT) == []


def test_a_script_pushes_by_gradio_client(home: tuple[AppProcess, Run], served: Hub) -> None:
    app, run = home
    client = Client(app.url, verbose=False)
    asked = {"run_id": run.run_id, "repo_id": "alice/scripted", "token": ALICE, "api_name": "/push_run"}
    card = {"limits": "English tickets only."}
    first = client.predict(**asked, card=card)
    assert first["needed"] and first["plan"][0] == "alice/scripted: is to be made, private, as v1"
    assert first["warnings"][0].startswith(UNKNOWN) and ("models", "alice/scripted") not in served.repos
    (pushed,) = client.predict(**asked, card=card, agreed=first["agree"])["pushed"]
    assert (pushed["version"], pushed["proof"]["state"]) == ("v1", "proven")
    repo = served.repo("alice/scripted", "models")
    assert pushed["commit"] == repo.head.oid and "English tickets only." in served.read(repo, "README.md").decode()
    for wrong, value, told in (
        ("token", "", "token is missing; pass one with write permission, or set HF_TOKEN where the app is started"),
        ("token", f"hf_{MARK}no", "account: the Hub does not accept the token"),
        ("repo_id", " ", "no repository is named; write name or owner/name"),
        ("what", "model", "--what 'model': choose from adapter, merged, dataset"),
        ("card", {"limit": "x"}, "card: has a field 'limit'; those of a card are intended_use, limits,"),
    ):
        with pytest.raises(AppError) as error:
            client.predict(**asked | {wrong: value})
        assert str(error.value).startswith(told) and "\n" not in str(error.value) and MARK not in str(error.value)


def test_a_push_outlives_the_app_and_is_found_by_the_next_one(
    home: tuple[AppProcess, Run],
    chromium: Browser,  # noqa: F811
    page: Publishing,
    served: Hub,
) -> None:
    app, _ = home
    page.type_token(ALICE)
    before = len(served.requests)
    page.push("alice/outlives")
    wait_for(lambda: any("/preupload/" in seen.path for seen in served.requests[before:]), seconds=60)
    app.kill()
    app.start()
    page.page.goto(app.url)
    page.open()
    expect(page.page.locator("#push-earlier")).to_contain_text(
        "alice/outlives v1 · adapter · ✓ arrived as sent, loads, same logits"
    )
    assert len(served.repo("alice/outlives", "models").commits) == 2
    assert app.written_with(MARK) == []
