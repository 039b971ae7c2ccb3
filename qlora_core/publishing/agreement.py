"""What a person is shown before a push, and that nothing else is done than what was shown."""

import hashlib
import json
from dataclasses import dataclass
from enum import Enum, auto

from qlora_core.errors import HubError


class Unseen(Enum):
    """Agrees to whatever it is, as a script may that says so. No text that a client sends is equal to it."""

    UNSEEN = auto()


UNSEEN = Unseen.UNSEEN


@dataclass(frozen=True)
class Agreement:
    """`sentences`: what changes; `warnings`: what speaks against it; `plan`: the digest of the changes. `needed` where
    something is there already, everybody will see it, or a warning stands."""

    sentences: tuple[str, ...]
    warnings: tuple[str, ...]
    plan: str
    needed: bool

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps([self.plan, self.warnings]).encode()).hexdigest()[:12]

    def check(self, agreed: str | Unseen | None) -> None:
        """Raises NotAgreed unless `agreed` is the digest of just this, or is None and nothing needs to be agreed to."""
        if (self.needed or agreed is not None) and agreed not in (self.digest, UNSEEN):
            raise NotAgreed(self, changed=bool(agreed))


class NotAgreed(HubError):
    """Nothing was sent, because nobody has agreed to what would change, or it is another change by now."""

    def __init__(self, agreement: Agreement, *, changed: bool) -> None:
        self.agreement, self.changed = agreement, changed
        why = "this push would change something else than what was agreed to" if changed else "this needs a look first"
        lines = [
            why,
            *agreement.sentences,
            *agreement.warnings,
            f"push again with --agreed {agreement.digest} to do so",
        ]
        super().__init__("\n".join(lines))
