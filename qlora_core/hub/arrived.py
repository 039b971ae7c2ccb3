"""Downloads a pushed model anew, past every cache, and compares each file's SHA-256 with what was sent."""

from pathlib import Path

from qlora_core.errors import HubError
from qlora_core.hub.faults import hub_errors
from qlora_core.hub.files import sha256
from qlora_core.hub.push import Pushed


def download(pushed: Pushed, cache: Path, *, token: str, endpoint: str | None = None) -> Path:
    """The folder below the empty `cache` that the commit came into. Raises HubError naming every file that is not as sent."""
    from huggingface_hub import snapshot_download

    assert not any(cache.iterdir()), "a cache that holds something proves nothing"
    what = f"model {pushed.repo_id!r}"
    with hub_errors(f"{what}: was pushed, but could not be downloaded again", token):
        found = snapshot_download(
            pushed.repo_id, revision=pushed.commit, cache_dir=cache, token=token, endpoint=endpoint,
            allow_patterns=list(pushed.files),
        )  # fmt: skip
    folder = Path(found)
    wrong = [n for n, digest in pushed.files.items() if not (folder / n).exists() or sha256(folder / n) != digest]
    if wrong:
        raise HubError(
            f"{what}: commit {pushed.commit[:8]} came back with other bytes in {', '.join(wrong)}; push again"
        )
    return folder
