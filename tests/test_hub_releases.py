"""The record of a version: what is read of a stranger's, and what is not published over what."""

import pytest

from qlora_core.hub.releases import Release, gate


@pytest.mark.parametrize("content", [b"[" * 100_000, b"{", b"[]", b'{"files": {"a": 1}}', b'{"what": 1}', b"\xff"])
def test_what_something_else_wrote_is_no_record(content: bytes) -> None:
    assert Release.from_bytes(content) is None


@pytest.mark.parametrize(
    ("loss", "score", "told"),
    [
        (1.04, 0.77, None),
        (1.06, 0.8, "an evaluation loss of 1.0000 on the same rows, this one 1.0600, which is 6.0% worse"),
        (0.9, 0.7, "80.0% of the same rows right, this one 70.0%"),
        (1.06, 0.7, "6.0% worse; and 80.0% of the same rows right, this one 70.0%"),
    ],
)
def test_nothing_is_published_over_a_version_that_was_better(loss: float, score: float, told: str | None) -> None:
    before = Release("adapter", "v1", eval_fingerprint="rows", metrics={"eval_loss": 1.0, "score": 0.8})
    new = Release("adapter", eval_fingerprint="rows", metrics={"eval_loss": loss, "score": score})
    refused, unknown = gate("model 'me/it'", before, new)
    assert unknown is None and (told in (refused or "") if told else refused is None)
    assert gate("model 'me/it'", before, Release("adapter", eval_fingerprint="others", metrics=new.metrics))[0] is None
