"""The record of a version that each push puts into its repository, the names of versions, and the gate before a new one."""

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from qlora_core.errors import HubError

RECORD = "release.json"
MODELS = ("adapter", "merged")
FORCE = "--force, or “Over a better version” on the page"
# Of an adapter; of the model from which a merged one was made.
LOSSES, SCORES = ("eval_loss", "trained_eval_loss"), ("score", "trained_score")
WORSE_SHARE = 0.05  # of the older version's measure, beyond which a version is not published over it
MOST_BYTES = 1_000_000  # of a record; a stranger's file may be anything
VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
REVISION = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._/-]{0,126}[A-Za-z0-9])?")


@dataclass(frozen=True)
class Release:
    """What a version is. `version` is "" until it is known; `files` by path -> SHA-256 and git's blob hash, besides the record.

    `metrics` holds numbers by name; the first of LOSSES and of SCORES are compared where `eval_fingerprint` is the same."""

    what: str
    version: str = ""
    run_id: str = ""
    base_model: str = ""
    dataset_fingerprint: str = ""
    eval_fingerprint: str = ""
    git_commit: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    files: dict[str, tuple[str, str]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def to_bytes(self) -> bytes:
        return (json.dumps(self.to_json(), indent=1, sort_keys=True, allow_nan=False) + "\n").encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> "Release | None":
        """None for a file of this name that something else wrote."""
        try:
            values = json.loads(content)
            known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
            known["files"] = {str(name): (str(a), str(b)) for name, (a, b) in known.get("files", {}).items()}
            known["metrics"] = {str(name): float(value) for name, value in known.get("metrics", {}).items()}
            found = cls(**known)
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
            return None
        texts = (
            found.what,
            found.version,
            found.run_id,
            found.base_model,
            found.dataset_fingerprint,
            found.eval_fingerprint,
        )
        return found if all(isinstance(text, str) for text in texts) else None


def gate(what: str, before: Release | None, new: Release) -> tuple[str | None, str | None]:
    """(why the new version should not replace the one before, why that cannot be told): the first is an evaluation loss on the
    same rows that is more than 5 % higher, or a task score that is more than 5 % lower."""
    if before is None or before.what not in MODELS:
        return None, None
    old, now = _first(before, LOSSES), _first(new, LOSSES)
    if old is None or now is None:
        which = f"version {before.version}" if old is None else "this version"
        return None, f"{what}: {which} has no evaluation loss on record, so which of the two is better is not known"
    if not new.eval_fingerprint or before.eval_fingerprint != new.eval_fingerprint:
        return (
            None,
            f"{what}: version {before.version} was evaluated on other rows, so which of the two is better is not known",
        )
    worse = []
    if now > old * (1 + WORSE_SHARE):
        worse.append(
            f"an evaluation loss of {old:.4f} on the same rows, this one {now:.4f}, which is {now / old - 1:.1%} worse"
        )
    had, has = _first(before, SCORES), _first(new, SCORES)
    if had is not None and has is not None and has < had * (1 - WORSE_SHARE):
        worse.append(f"{had:.1%} of the same rows right, this one {has:.1%}")
    if not worse:
        return None, None
    return (f"{what}: its version {before.version} has {'; and '.join(worse)}"), None


def _first(release: Release, names: Iterable[str]) -> float | None:
    return next((release.metrics[name] for name in names if name in release.metrics), None)


def check_revision(revision: str | None) -> None:
    """A branch's name, before a repository is made for it. Raises HubError."""
    if revision and (
        not REVISION.fullmatch(revision) or ".." in revision or "//" in revision or revision.endswith(".lock")
    ):
        raise HubError(
            f"branch {revision!r}: is no name of a branch; use letters, digits, '-', '_', '.' and single slashes, as in 'trial'"
        )


def next_version(known: Iterable[str]) -> str:
    return f"v{max(map(number, known), default=0) + 1}"


def free_version(wanted: str, known: Iterable[str]) -> str:
    """A version that is not taken: the one that is wanted, with a second number where other files have that already."""
    taken = set(known)
    again = (f"{wanted}.{again}" for again in range(1, len(taken) + 2))
    return wanted if wanted not in taken else next(name for name in again if name not in taken)


def check_version(version: str) -> None:
    if version and (not VERSION.fullmatch(version) or ".." in version or version.endswith((".", ".lock"))):
        raise HubError(
            f"version {version!r}: is no name of a version; use letters a to z, digits, '-', '_' and '.', as in 'v2' or '1.0.3'"
        )
    if version in ("main", "HEAD"):
        raise HubError(f"version {version!r}: is the name of a branch; choose another, as in 'v2'")


def number(version: str) -> int:
    found = re.fullmatch(r"v(\d{1,9})", version)
    return int(found[1]) if found else 0
