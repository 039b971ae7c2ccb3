"""GGUF files: made by the converter that settings name, which is a stand-in here, and never half."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import make_run, train_here

from qlora_core import cli
from qlora_core.errors import ModelError, RunError
from qlora_core.gguf_export import export_gguf
from qlora_core.runs import Run
from qlora_core.settings import Settings

# What llama.cpp's convert_hf_to_gguf.py is called with.
STAND_IN = """
import argparse, json, os
from pathlib import Path
parser = argparse.ArgumentParser()
parser.add_argument("model", type=Path)
parser.add_argument("--outfile", type=Path)
parser.add_argument("--outtype", choices=["bf16", "f16", "q8_0"])
asked = parser.parse_args()
kind = json.loads((asked.model / "config.json").read_text())["model_type"]
assert "HF_TOKEN" not in os.environ and os.environ["HF_HUB_OFFLINE"] == "1"
asked.outfile.write_text(f"GGUF {asked.outtype} {kind}")
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train_here(make_run(tmp_path_factory.mktemp("run"), max_steps=1, eval_steps=1))


def with_converter(run: Run, path: Path, script: str = STAND_IN) -> Run:
    path.write_text(script)
    return Run(run.path, replace(run.settings, gguf_converter=str(path)))


def test_a_merged_model_becomes_one_file(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    told: list[str] = []
    found = export_gguf(with_converter(run, tmp_path / "convert_hf_to_gguf.py"), report=told.append)
    assert found == run.path / "merged-original-bf16.gguf" and found.read_text() == "GGUF bf16 llama"
    assert told == ["merging onto the original base", "converting merged-original to GGUF, bf16"]
    again = with_converter(run, tmp_path / "broken.py", "raise SystemExit('not asked again')")
    assert export_gguf(again) == found
    program = tmp_path / "convert-hf-to-gguf"  # as a package or Debian installs it
    asked = with_converter(run, program, f"#!{sys.executable}\n{STAND_IN}")
    program.chmod(0o755)
    assert export_gguf(asked, kind="q8_0").read_text() == "GGUF q8_0 llama"


def test_without_a_converter_it_says_what_to_do(run: Run, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="set QLORA_LAB_GGUF_CONVERTER to the path of its convert_hf_to_gguf.py"):
        export_gguf(run)
    gone = Run(run.path, replace(run.settings, gguf_converter=str(tmp_path / "gone.py")))
    with pytest.raises(RunError, match=r"gone\.py, and there is no such file"):
        export_gguf(gone)


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("import sys; open(sys.argv[3], 'w').write('half'); raise SystemExit('BPE pre-tokenizer was not recognized')",
         r"(?s)conversion to GGUF failed: BPE pre-tokenizer was not recognized .*gguf-log\.txt"),
        ("import errno, os; raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))", "the disk became full"),
        ("pass", "ended without a word, and without a GGUF file"),
    ],
    ids=["fails", "disk", "nothing"],
)  # fmt: skip
def test_a_converter_that_fails_leaves_no_half_file(run: Run, tmp_path: Path, script: str, told: str) -> None:
    with pytest.raises((ModelError, RunError), match=told):
        export_gguf(with_converter(run, tmp_path / "convert.py", script), kind="f16")
    assert not [path.name for path in run.path.iterdir() if "-f16.gguf" in path.name]


def test_a_program_that_cannot_be_run_is_told(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be run: Permission denied"):
        export_gguf(with_converter(run, tmp_path / "not-executable"), kind="f16")


def test_the_command_exports(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "convert.py").write_text(STAND_IN)
    monkeypatch.setenv("QLORA_LAB_GGUF_CONVERTER", str(tmp_path / "convert.py"))
    assert Settings.from_environment().gguf_converter == str(tmp_path / "convert.py")
    assert cli.main(["merge", run.run_id, "--export", "gguf", "--home", str(run.settings.home)]) == 0
    assert capsys.readouterr().out.strip().endswith("merged-original-bf16.gguf")
