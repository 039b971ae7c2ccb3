"""One or several things in one go: shown and agreed to as one, pushed one after the other, and put into one collection."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from qlora_core import hub
from qlora_core.errors import HubError, LabError
from qlora_core.publishing.agreement import Agreement, Unseen
from qlora_core.publishing.parts import Part

# Of the second and further things, which are in repositories of their own beside the first.
SUFFIX = {"adapter": "-adapter", "merged": "-merged", "dataset": "-data", "report": "-report"}


def repositories(repo_id: str, what: list[str]) -> dict[str, str]:
    """The first has the name that was given."""
    return {one: repo_id if number == 0 else f"{repo_id}{SUFFIX[one]}" for number, one in enumerate(what)}


@dataclass(frozen=True)
class Together:
    """`collection`: the title of one that is made or added to; "" for none."""

    parts: tuple[Part, ...]
    collection: str = ""
    private: bool = True
    report: Callable[[str], None] = lambda _: None

    @cached_property
    def plans(self) -> tuple[hub.PushPlan, ...]:
        return tuple(part.push.plan() for part in self.parts)

    @cached_property
    def agreement(self) -> Agreement:
        """What a person must have seen before anything is sent. Raises HubError where one cannot be pushed, and then none is."""
        refused = [
            why
            for part, plan in zip(self.parts, self.plans, strict=True)
            if not part.push.force
            for why in plan.refused
        ]
        if refused:
            raise HubError(*refused)
        sentences = []
        for part, plan in zip(self.parts, self.plans, strict=True):
            sentences += [*plan.sentences(), *(f"  {note}" for note in part.notes)]
        if self.collection:
            sentences.append(self._collection_planned())
        told = [part.warning for part in self.parts if part.warning]
        told += [doubt for part in self.parts for doubt in part.doubts]
        told += [why for plan in self.plans for why in (*plan.refusals, *plan.doubts)]
        warnings = tuple(dict.fromkeys(told))
        digest = hashlib.sha256(" ".join([plan.digest for plan in self.plans] + [self.collection]).encode()).hexdigest()
        shown = any(plan.touches_others or (plan.creates and not plan.private) for plan in self.plans)
        sends = any(plan.changes_anything for plan in self.plans)
        return Agreement(tuple(sentences), warnings, digest, shown or (sends and bool(warnings)))

    def _collection_planned(self) -> str:
        token, endpoint = self.parts[0].push.token, self.parts[0].push.endpoint
        owner = self.plans[0].repo_id.partition("/")[0]
        return hub.plan_collection(self.collection, owner, token=token, private=self.private, endpoint=endpoint)

    def publish(self, agreed: str | Unseen | None) -> dict[str, Any]:
        """{"pushed": a record each, "collection": its URL}. Raises NotAgreed before anything is sent, LabError naming what is on
        the Hub by then."""
        self.agreement.check(agreed)
        self.report("\n".join((*self.agreement.sentences, *self.agreement.warnings)))
        done: list[dict[str, Any]] = []
        for part, plan in zip(self.parts, self.plans, strict=True):
            try:
                done.append(part.publish(plan.digest))
            except LabError as error:
                if not done:
                    raise
                urls = ", ".join(entry["url"] for entry in done)
                raise type(error)(*error.problems, f"pushed before it, and there now: {urls}") from None
        return {"pushed": done, "collection": self._collected(done) if self.collection else None}

    def _collected(self, done: list[dict[str, Any]]) -> str:
        items = [
            hub.CollectionItem(entry["repo_id"], part.push.kind, f"{entry['what']}, {entry['version']}")
            for entry, part in zip(done, self.parts, strict=True)
        ]
        token, endpoint = self.parts[0].push.token, self.parts[0].push.endpoint
        owner = items[0].repo_id.partition("/")[0]
        return hub.push_collection(
            self.collection,
            items,
            namespace=owner,
            token=token,
            private=self.private,
            endpoint=endpoint,
            report=self.report,
        )
