"""What a failed request to the Hub means, as a sentence with its remedy and without the token. Imports no torch."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from qlora_core.errors import HubError, LabError
from qlora_core.hub import scopes

TOKENS_PAGE = f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co').rstrip('/')}/settings/tokens"
SIGN_IN = f"sign in, or use a token from {TOKENS_PAGE}"
# A header can hold no other characters, and clients show the whole header in what they say of one that does.
TOKEN = re.compile(r"[\x21-\x7e]+")
# Xet's client has no exceptions of its own and says the status only in words.
XET_STATUS = re.compile(r"HTTP status (?:client|server) error \((\d{3})")
SPACE = re.compile(r"storage (?:limit|quota|patterns)|(?:limit|quota) (?:of|for) storage", re.IGNORECASE)


@contextmanager
def hub_errors(what: str, token: str | None, *, error: type[LabError] = HubError) -> Iterator[None]:
    """Whatever the Hub's clients raise inside becomes one problem of `what`."""
    from httpx2 import HTTPError, InvalidURL

    if token and not TOKEN.fullmatch(token):
        raise error(
            f"{what}: the token holds a space, a line break or another character that no token has; copy it again"
        )
    try:
        yield
    except LabError:
        raise
    # Refused connections are httpx2's, failed uploads RuntimeError (LFS) or ConnectionError (Xet), bad cards ValueError.
    except (HTTPError, InvalidURL, OSError, RuntimeError, ValueError) as found:
        raise error(f"{what}: {reason(found, token)}") from None


def reason(error: BaseException, token: str | None) -> str:
    """What a failed request to the Hub means and what to do, without the token."""
    from httpx2 import HTTPError, InvalidURL
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, (RuntimeError, LocalEntryNotFoundError)) and isinstance(error.__cause__, Exception):
        return reason(error.__cause__, token)
    status, text = _status(error), _short(error, token)
    if isinstance(error, GatedRepoError):
        signed_in = "with the account of this token" if token else f"and {SIGN_IN}"
        return f"is gated; ask for access on its page {signed_in}"
    if isinstance(error, RevisionNotFoundError):
        return "has no such revision; name a branch, a tag or a commit of it, or none for the newest"
    if isinstance(error, RepositoryNotFoundError) or (status == 401 and not token):
        if token:
            return "is not on the Hub, or is private and this token may not read it; check the spelling"
        return f"is not on the Hub, or is private; check the spelling, and for a private one {SIGN_IN}"
    if status == 401:
        return f"the Hub does not accept the token: it is invalid or has expired; {SIGN_IN}"
    if status in (402, 413) or (status == 403 and SPACE.search(text)):
        return (
            f"the Hub has no space for it ({text}); delete there what is not needed, get more space on the settings page of "
            "the account, or publish it as public, for which other limits hold"
        )
    if status == 403 and isinstance(error, ConnectionError):
        return (
            "the Hub does not allow the upload: this token may not write there, or there is no space left for it; use a token "
            "that may write there, or look at the space on the settings page of the account"
        )
    if status == 403:
        remedy = scopes.refused() if (token or "").startswith(scopes.PREFIX) else "use a token that may write there"
        return f"the Hub does not allow it to this token ({text}); {remedy}"
    if status in (409, 412):
        return "was changed by someone else at the same time, and nothing was written; try again"
    if status == 429:
        return "the Hub asks to wait, too many requests were made; try again in some minutes"
    if status is not None and status >= 500:
        return f"the Hub has a fault of its own (status {status}); try again later"
    if isinstance(error, InvalidURL):
        return f"the Hub has no such address ({text}); correct HF_ENDPOINT, or unset it"
    if isinstance(error, OfflineModeIsEnabled):
        return "the Hub is switched off here (HF_HUB_OFFLINE); unset it"
    if status is None and isinstance(error, (HTTPError, ConnectionError, TimeoutError, LocalEntryNotFoundError)):
        return f"the Hub cannot be reached, or the connection broke ({text}); check the connection and try again"
    return text


def _status(error: BaseException) -> int | None:
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return error.response.status_code
    told = XET_STATUS.search(str(error)) if isinstance(error, ConnectionError) else None
    return int(told[1]) if told else None


def _short(error: BaseException, token: str | None) -> str:
    """The error's own words in one line: what the server said of it, where it said something."""
    told = getattr(error, "server_message", None) or str(error) or type(error).__name__
    line = " ".join(told.split())
    return (line.replace(token, "…") if token else line)[:200]
