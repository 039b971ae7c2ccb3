"""Several things of a run in one go: shown and agreed to as one, pushed one after the other."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from qlora_core.errors import LabError
from qlora_core.hub.models import ModelPush
from qlora_core.publishing.agreement import Agreement
from qlora_core.publishing.models import agreement, publish
from qlora_core.runs import Run

# Of the second and further things, which are in repositories of their own beside the first.
SUFFIX = {"adapter": "-adapter", "merged": "-merged"}


def repositories(repo_id: str, what: list[str]) -> dict[str, str]:
    """The first has the name that was given."""
    return {one: repo_id if number == 0 else f"{repo_id}{SUFFIX[one]}" for number, one in enumerate(what)}


@dataclass(frozen=True)
class Together:
    run: Run
    pushes: tuple[ModelPush, ...]

    @cached_property
    def agreements(self) -> tuple[Agreement, ...]:
        return tuple(agreement(self.run, push) for push in self.pushes)

    @property
    def agreement(self) -> Agreement:
        """All of them as one. Raises HubError where one cannot be made, and then none is."""
        every = self.agreements
        return Agreement(
            tuple(sentence for one in every for sentence in one.sentences),
            tuple(dict.fromkeys(warning for one in every for warning in one.warnings)),
            hashlib.sha256(" ".join(one.plan for one in every).encode()).hexdigest(),
            any(one.needed for one in every),
        )

    def publish(self, agreed: str | None) -> list[dict[str, Any]]:
        """Records of what was pushed. Raises NotAgreed before anything is sent, HubError naming what is on the Hub by then."""
        shown = self.agreement
        self.pushes[0].report("\n".join((*shown.sentences, *shown.warnings)))
        shown.check(agreed)
        done: list[dict[str, Any]] = []
        for push, one in zip(self.pushes, self.agreements, strict=True):
            try:
                done.append(publish(self.run, push, one.digest))
            except LabError as error:
                if not done:
                    raise
                urls = ", ".join(entry["url"] for entry in done)
                raise type(error)(*error.problems, f"pushed before it, and there now: {urls}") from None
        return done
