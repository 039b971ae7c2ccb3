"""With whose token something is fetched, for what is too far from the person who gave it to be passed it. Keeps it for a call."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from qlora_core.hub.access import machine_token

_acting: ContextVar[str | None] = ContextVar("acting", default=None)


@contextmanager
def acting_as(token: str | None) -> Iterator[None]:
    """What this thread fetches inside, it fetches with this token."""
    before = _acting.set(token)
    try:
        yield
    finally:
        _acting.reset(before)


def acting_token() -> str | None:
    """That of `acting_as`, else that of this machine, which a Space has not."""
    return _acting.get() or machine_token()
