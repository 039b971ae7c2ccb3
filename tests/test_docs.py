"""The README against the project: what it shows must exist, parse and be pinned as it says."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from qlora_core import models
from qlora_core.cli import parser
from qlora_core.settings import Settings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FRONT_MATTER = yaml.safe_load(README.split("---\n")[1])
# What the Hub accepts there (huggingface.co/docs/hub/spaces-config-reference).
COLOURS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}


def shown_commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


def test_front_matter_is_that_of_a_gradio_space_with_the_pinned_version() -> None:
    pinned = re.search(r"^gradio\[oauth\]==(\S+)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert pinned and FRONT_MATTER["sdk_version"] == pinned[1]
    assert FRONT_MATTER["sdk"] == "gradio"
    assert (ROOT / FRONT_MATTER["app_file"]).is_file()
    assert {FRONT_MATTER["colorFrom"], FRONT_MATTER["colorTo"]} <= COLOURS
    assert len(FRONT_MATTER["short_description"]) <= 60
    assert isinstance(FRONT_MATTER["python_version"], str), "unquoted, YAML would read 3.10 as 3.1"


def test_the_space_preloads_the_model_and_revision_that_bundled_looks_for() -> None:
    (line,) = FRONT_MATTER["preload_from_hub"]
    repository, files, revision = line.split()
    assert repository in FRONT_MATTER["models"]
    assert revision == models.HUB_REVISION
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(files.split(","))


def test_every_requirement_is_pinned() -> None:
    for name in ("requirements.txt", "tests/requirements.txt"):
        lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
        assert all(re.fullmatch(r"[\w\[\]-]+==[\w.]+", line) for line in lines), name


@pytest.mark.parametrize("command", [command for command in shown_commands() if command.startswith("python")])
def test_a_shown_command_parses(command: str) -> None:
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "qlora_core"]
    parser().parse_args(words[3:])


@pytest.mark.parametrize("command", [command for command in shown_commands() if command.startswith("make")])
def test_a_shown_make_target_exists(command: str) -> None:
    assert re.search(rf"^{command.split()[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_every_environment_variable_is_documented_with_its_default() -> None:
    for spec in Settings.__dataclass_fields__.values():
        row = re.search(rf"^\| `{spec.metadata['env']}` \|.*$", README, re.MULTILINE)
        assert row, spec.metadata["env"]
        if isinstance(spec.default, int):
            assert f"| {spec.default} |" in row[0]


def test_ci_calls_what_the_readme_says() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert "make test\n" in script and "make check\n" in script
    assert ".ci/run" in (ROOT / ".github" / "workflows" / "ci.yml").read_text()
