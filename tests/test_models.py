"""Base models: what was named is found, or the refusal says what is wrong with it; nothing here asks the network."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from helpers import model_folder, settings_in
from huggingface_hub import errors as hub_errors

from qlora_core import models
from qlora_core.errors import ModelError
from qlora_core.models import BaseModel, resolve, weights_sha256


def hub(monkeypatch: pytest.MonkeyPatch, answer: Callable[..., str]) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", answer)


def raising(error: Exception) -> Callable[..., str]:
    def download(*_: Any, **__: Any) -> str:
        raise error

    return download


def http_error(kind: type[Exception]) -> Exception:
    """As huggingface_hub raises it: made from a response."""
    import httpx2

    response = httpx2.Response(404, request=httpx2.Request("GET", "https://huggingface.co/x"))
    return kind("not there", response=response)  # type: ignore[call-arg]


def test_local_folder_is_a_base_model(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "tiny")
    model = resolve(str(folder), settings_in(tmp_path))
    assert (model.name, model.folder, model.revision) == ("tiny", folder, None)
    assert BaseModel.from_json(json.loads(json.dumps(model.to_json()))) == model


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json cannot be read"),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff"), "config.json cannot be read"),
        (lambda folder: (folder / "config.json").write_text('{"auto_map": {}}'), "never run here"),
        (
            lambda folder: (folder / "config.json").write_text('{"quantization_config": {"bits": 4}}'),
            "quantised already",
        ),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "safe_serialization"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "merge it first"),
    ],
)
def test_folder_that_is_no_usable_model_says_why(tmp_path: Path, change: Callable[[Path], Any], says: str) -> None:
    folder = model_folder(tmp_path / "tiny")
    change(folder)
    with pytest.raises(ModelError, match=says) as error:
        resolve(str(folder), settings_in(tmp_path))
    assert str(folder) in str(error.value)


def test_all_that_is_wrong_with_a_folder_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError) as error:
        resolve(str(tmp_path / "empty"), settings_in(tmp_path))
    assert len(error.value.problems) == 2


@pytest.mark.parametrize(
    "name",
    ["../missing", "./missing", "a..b", "a/b/c", "~nobody-here/x", "owner/name@", "two words", "x" * 300, "a\0b"],
)
def test_name_that_can_be_no_model_is_refused_without_the_network(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match="is no folder here and no Hub id"):
        resolve(name, settings_in(tmp_path))


def test_hub_model_is_pinned_to_the_commit_that_was_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit, asked = "a" * 40, {}

    def download(repo_id: str, **options: Any) -> str:
        asked.update(options, repo_id=repo_id)
        return str(model_folder(tmp_path / commit))

    hub(monkeypatch, download)
    model = resolve("owner/name@v1", settings_in(tmp_path), token="hf_secret")
    assert (model.name, model.revision) == ("owner/name", commit)
    assert (asked["repo_id"], asked["revision"], asked["token"]) == ("owner/name", "v1", "hf_secret")
    assert not any("bin" in pattern or "py" in pattern for pattern in asked["allow_patterns"]), "no pickles, no code"
    assert "hf_secret" not in json.dumps(model.to_json())


def test_no_token_of_the_machine_is_used_unless_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def download(repo_id: str, **options: Any) -> str:
        asked.update(options)
        return str(model_folder(tmp_path / "snapshot"))

    hub(monkeypatch, download)
    resolve("owner/name", settings_in(tmp_path))
    assert asked["token"] is False


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (http_error(hub_errors.GatedRepoError), "is gated"),
        (http_error(hub_errors.RevisionNotFoundError), "no revision 'v9'"),
        (http_error(hub_errors.RepositoryNotFoundError), "check the spelling"),
        (hub_errors.LocalEntryNotFoundError("offline"), "could not be fetched"),
        (http_error(hub_errors.HfHubHTTPError), "could not be fetched"),
        (OSError(28, "No space left on device"), "could not be fetched"),
    ],
)
def test_hub_refusal_is_one_clear_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, says: str
) -> None:
    hub(monkeypatch, raising(error))
    with pytest.raises(ModelError, match=says) as refusal:
        resolve("owner/name@v9", settings_in(tmp_path))
    assert "'owner/name'" in str(refusal.value)


def test_bundled_model_that_is_not_there_yet_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def download(repo_id: str, **options: Any) -> str:
        asked.update(options)
        raise hub_errors.LocalEntryNotFoundError("not in the cache")

    hub(monkeypatch, download)
    with pytest.raises(ModelError, match="make model"):
        resolve("bundled", settings_in(tmp_path))
    assert asked["local_files_only"] is True
    assert asked["revision"] == models.HUB_REVISION


def test_weight_hash_follows_the_weights_and_reads_blobs_of_the_cache_by_name(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "tiny")
    model = resolve(str(folder), settings_in(tmp_path))
    before = weights_sha256(model)
    (folder / "model.safetensors").write_bytes(b"other")
    assert weights_sha256(model) != before
    blob = tmp_path / "d9298a10d1b0735837dc4bd85dac641b0f3cef27a47e5d53a54f2f3f5b2fcffa"  # SHA-256 of "other"
    blob.write_bytes(b"other")
    linked = model_folder(tmp_path / "linked")
    (linked / "model.safetensors").unlink()
    (linked / "model.safetensors").symlink_to(blob)
    assert weights_sha256(resolve(str(linked), settings_in(tmp_path))) == weights_sha256(model)
