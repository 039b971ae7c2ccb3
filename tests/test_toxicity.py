"""Toxicity: the process says what transformers says, in the order of the texts, and ends when nobody listens."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models  # noqa: F401 - one thread, as in the process below
import torch
from helpers import ROOT, fake_gpus, held_by_another_process, settings_in, tokenizer_folder, wait_for, write_rows
from transformers import CONFIG_MAPPING, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from qlora_core import queue, toxicity
from qlora_core.data.formats import read_rows
from qlora_core.data.preparation import Preparation
from qlora_core.data.preparing import prepare
from qlora_core.errors import ModelError
from qlora_core.toxicity import Scores, Verdict, scores
from qlora_core.worker.toxicity import Classifier, toxic_labels

POSITIONS = 64
SIZES: dict[str, dict[str, Any]] = {
    "bert": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": POSITIONS},
}
SIZES["roberta"] = SIZES["bert"]
TEXTS = ["You are kind.", "", "a " * 200, "What?", "the lazy dog " * 6, "le renard brun", "jumps\n\n", "\ud800"] * 5
LABELS = ("neutral", "toxic")
MANY = ("toxicity", "obscene", "female")


def classifier_folder(folder: Path, *, kind: str = "bert", labels: tuple[str, ...] = LABELS, **changed: Any) -> Path:
    """A random classifier with a byte-level tokenizer; its head is large, so that texts differ in their scores."""
    told = tokenizer_folder(folder) / "tokenizer_config.json"
    told.write_text(json.dumps(json.loads(told.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    positions = {} if kind == "gpt2" else {"max_position_embeddings": POSITIONS}
    if kind == "roberta":
        positions = {"max_position_embeddings": POSITIONS + tokenizer.pad_token_id + 1}
    config = CONFIG_MAPPING[kind](
        vocab_size=len(tokenizer),
        pad_token_id=None if kind == "gpt2" else tokenizer.pad_token_id,
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
        **SIZES[kind],
        **positions,
        **changed,
    )
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(20 if "classif" in name or "score" in name else 3)
    model.save_pretrained(folder)
    return folder


def directly(folder: Path, text: str) -> torch.Tensor:
    """What transformers computes for one text alone."""
    model = AutoModelForSequenceClassification.from_pretrained(str(folder)).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    text = text.encode("utf-8", "replace").decode() or tokenizer.eos_token
    row = tokenizer(text, truncation=True, max_length=POSITIONS, return_tensors="pt")
    with torch.inference_mode():
        return model(input_ids=row["input_ids"], attention_mask=row["attention_mask"]).logits[0]


def judged(folder: Path, texts: list[str]) -> list[tuple[str, float]]:
    answers = [answer for batch in Classifier(folder).judge(texts) for answer in batch]
    assert sorted(answer[0] for answer in answers) == list(range(len(texts)))
    return [(label, score) for _, label, score, _ in sorted(answers)]


def running(text: str) -> list[int]:
    """Processes whose command holds the text."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_text()
        except OSError:  # ended meanwhile
            continue
        if text in command:
            found.append(int(folder.name))
    return found


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifier_folder(tmp_path_factory.mktemp("binary"))


def test_process_gives_in_order_what_transformers_says(
    binary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toxicity, "WINDOW_TEXTS", 24)  # 40 texts: two windows, the second one shorter
    reported: list[int] = []
    asked: list[int] = []
    found = scores(
        iter(TEXTS),
        model=str(binary),
        settings=settings_in(tmp_path),
        report=reported.append,
        check_stop=lambda: asked.append(1),
    )
    verdicts = list(found)
    expected = [float(directly(binary, text).softmax(-1)[1]) for text in TEXTS[:8]]
    assert [verdict.score for verdict in verdicts] == pytest.approx(expected * 5, abs=1e-5)
    assert {verdict.label for verdict in verdicts} == {"toxic"}
    assert max(expected) - min(expected) > 0.1  # texts that score alike would hide a wrong order
    assert found.cut == 5
    assert reported[-1] == len(TEXTS) and reported == sorted(reported) and len(asked) == len(reported)
    assert not running(str(binary))


@pytest.mark.parametrize("kind", ["distilbert", "roberta", "gpt2"])
def test_other_architectures_are_padded_and_cut_rightly(kind: str, tmp_path: Path) -> None:
    folder = classifier_folder(tmp_path, kind=kind)
    expected = [float(directly(folder, text).softmax(-1)[1]) for text in TEXTS[:8]]
    assert [score for _, score in judged(folder, TEXTS[:8])] == pytest.approx(expected, abs=1e-5)


def test_several_labels_at_once_give_the_highest_toxic_one(tmp_path: Path) -> None:
    folder = classifier_folder(tmp_path, labels=MANY, problem_type="multi_label_classification")
    found = judged(folder, TEXTS[:8])
    for text, (label, score) in zip(TEXTS, found, strict=False):
        each = directly(folder, text).sigmoid()[:2]  # "female" is no judgement
        assert (label, score) == (MANY[int(each.argmax())], pytest.approx(float(each.max()), abs=1e-5))


def test_labels_that_exclude_each_other_are_added(tmp_path: Path) -> None:
    labels = ("hate speech", "normal", "offensive")
    folder = classifier_folder(tmp_path, labels=labels)
    for text, (label, score) in zip(TEXTS, judged(folder, TEXTS[:8]), strict=False):
        each = directly(folder, text).softmax(-1)
        assert label == ("hate speech" if each[0] >= each[2] else "offensive")
        assert score == pytest.approx(1 - float(each[1]), abs=1e-5)


def test_one_label_alone_is_a_yes_or_no(tmp_path: Path) -> None:
    folder = classifier_folder(tmp_path, labels=("toxic",))
    expected = [("toxic", pytest.approx(float(directly(folder, text).sigmoid()[0]), abs=1e-5)) for text in TEXTS[:4]]
    assert judged(folder, TEXTS[:4]) == expected


@pytest.mark.parametrize(
    ("labels", "toxic"),
    [
        ("LABEL_0 LABEL_1", "LABEL_1"),
        ("non-toxic toxic", "toxic"),
        ("toxic nontoxic", "toxic"),
        ("nothate hate", "hate"),
        ("non-offensive offensive", "offensive"),
        ("not_hate implicit_hate explicit_hate", "implicit_hate explicit_hate"),
        ("Normal Schimpf", "Schimpf"),
        ("OK S H V", "S H V"),
        (
            "toxic severe_toxic obscene threat insult identity_hate",
            "toxic severe_toxic obscene threat insult identity_hate",
        ),
        ("toxicity sexual_explicit male christian", "toxicity sexual_explicit"),
    ],
)
def test_toxic_side_is_told_by_the_names_of_the_labels(labels: str, toxic: str) -> None:
    names = labels.split()
    assert [names[number] for number in toxic_labels(names)] == toxic.split()


@pytest.mark.parametrize("labels", [["joy", "anger"], ["LABEL_0"], ["neutral", "safe"]])
def test_labels_without_a_toxic_side_are_refused(labels: list[str]) -> None:
    with pytest.raises(SystemExit, match="says what is toxic; choose a toxicity model"):
        toxic_labels(labels)


def endless() -> Iterator[str]:
    while True:
        yield "You are kind."


@pytest.mark.parametrize("how", ["close", "with", "stop"])
def test_process_ends_when_nobody_wants_more(how: str, binary: Path, tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def stop() -> None:
        if how == "stop":
            raise Stopped

    found = scores(endless(), model=str(binary), settings=settings_in(tmp_path), check_stop=stop)
    assert isinstance(found, Scores) and not running(str(binary))  # it starts with the first text
    if how == "stop":
        with pytest.raises(Stopped):
            next(found)
    elif how == "close":
        assert isinstance(next(found), Verdict) and running(str(binary))
        found.close()
    else:
        with found:
            next(found)
    assert not running(str(binary))
    assert next(found, None) is None


def test_no_texts_need_no_process(binary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    assert list(scores([], model=str(binary), settings=settings_in(tmp_path))) == []


def test_process_that_is_killed_is_told_of(binary: Path, tmp_path: Path) -> None:
    found = scores(endless(), model=str(binary), settings=settings_in(tmp_path))
    next(found)
    os.kill(running(str(binary))[0], 9)
    with pytest.raises(ModelError, match="ended by signal 9; check the memory"):
        wait_for(lambda: next(found) is None)


def broken(folder: Path, how: str) -> Path:
    classifier_folder(folder)
    config = json.loads((folder / "config.json").read_text())
    if how == "no head":
        config["architectures"] = ["BertForMaskedLM"]
    elif how == "no config":
        (folder / "config.json").unlink()
        return folder
    elif how == "pickle":
        torch.save({}, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    elif how == "remote code":
        config |= {"model_type": "homemade", "auto_map": {"AutoModelForSequenceClassification": "model.Homemade"}}
        (folder / "model.py").write_text("raise SystemExit('remote code was run')\n")
    elif how == "untrained":
        AutoModelForMaskedLM.from_config(CONFIG_MAPPING["bert"](**config)).save_pretrained(folder)
    elif how == "damaged":
        (folder / "model.safetensors").write_bytes(b"garbage")
    elif how == "labels":
        config |= {"id2label": {"0": "joy", "1": "anger"}, "label2id": {"joy": 0, "anger": 1}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            "no head",
            r"is no text classifier \(its config.json names BertForMaskedLM\); choose one whose architecture ends",
        ),
        ("no config", "has no config.json; choose a folder that `save_pretrained` wrote"),
        ("pickle", r"has no .safetensors weights, and others are never loaded; convert them"),
    ],
)
def test_what_is_no_classifier_is_refused_at_once(how: str, message: str, tmp_path: Path) -> None:
    folder = broken(tmp_path / "model", how)
    with pytest.raises(ModelError, match=f"toxicity model '{folder}': {message}"):
        scores(["a"], model=str(folder), settings=settings_in(tmp_path))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("remote code", r"needs code of its own \(model type 'homemade'\), which is never run here; choose a model"),
        ("untrained", "its weights lack .*classifier.bias, so it was never trained to classify"),
        ("damaged", "it cannot be loaded: "),
        ("labels", r"none of its labels \(joy, anger\) says what is toxic; choose a toxicity model"),
    ],
)
def test_what_the_worker_finds_wrong_is_said(how: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=message):
        Classifier(broken(tmp_path / "model", how))


def test_last_word_of_the_worker_names_the_model(tmp_path: Path) -> None:
    folder = broken(tmp_path / "model", "labels")
    with pytest.raises(ModelError) as caught:
        list(scores(["a"], model=str(folder), settings=settings_in(tmp_path)))
    assert str(caught.value) == (
        f"toxicity model '{folder}': none of its labels (joy, anger) says what is toxic; choose a toxicity model"
    )


@pytest.mark.parametrize("name", ["no/such/model/here", "a b", "-"])
def test_name_of_nothing_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError

    monkeypatch.setattr(toxicity, "snapshot_download", offline)
    with pytest.raises(ModelError, match=f"toxicity model '{name}': "):
        scores(["a"], model=name, settings=settings_in(tmp_path))


def test_weights_of_a_hub_model_are_fetched_after_its_config_was_read(
    binary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def download(repo_id: str, *, revision: str | None, allow_patterns: list[str], token: object) -> str:
        asked.append((repo_id, revision, allow_patterns, token))
        return str(broken(tmp_path / "model", "no head") if repo_id == "owner/base" else binary)

    monkeypatch.setattr(toxicity, "snapshot_download", download)
    scores(["a"], model="owner/name@v1", settings=settings_in(tmp_path))
    assert asked == [("owner/name", "v1", ["config.json"], False), ("owner/name", "v1", toxicity.FILES, False)]
    asked.clear()
    with pytest.raises(ModelError, match="'owner/base': is no text classifier"):
        scores(["a"], model="owner/base", settings=settings_in(tmp_path))
    assert asked == [("owner/base", None, ["config.json"], False)]


def test_gpu_is_held_while_it_is_used_and_left_to_a_run_that_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_gpus(monkeypatch, "GPU-a", "GPU-b")
    settings = settings_in(tmp_path)
    with queue.free_device(settings) as (device, held):
        assert device == "GPU-a" and len(held) == 1
        with queue.free_device(settings) as (other, _), queue.free_device(settings) as (third, none):
            assert (other, third, none) == ("GPU-b", "cpu", ())
    with held_by_another_process(settings.locks / "GPU-a.lock"), queue.free_device(settings) as (device, _):
        assert device == "GPU-b"


def test_pure_module_knows_no_torch() -> None:
    code = "import sys, qlora_core.toxicity; print(sorted({'torch', 'transformers'} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, "[]\n"), found.stderr


@pytest.mark.parametrize("what", ["find", "drop"])
def test_a_preparation_lists_or_drops_the_rows_that_the_model_calls_toxic(tmp_path: Path, what: str) -> None:
    model, texts = (
        classifier_folder(tmp_path / "model"),
        [f"{text} {n}" for n, text in enumerate(TEXTS[:7] * 3) if text.strip()],
    )
    path = write_rows(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
    rated = judged(model, [row.text for row in read_rows(path)[1]])
    threshold = sorted(score for _, score in rated)[len(rated) // 2]
    toxic = [number for number, (_, score) in enumerate(rated, 1) if score >= threshold]
    preparation = Preparation(
        toxicity_model=str(model), toxicity_threshold=threshold, toxic_rows=what, shuffle=False, eval_fraction=0,
        normalise=False, duplicates="keep",
    )  # fmt: skip
    made = prepare([str(path)], tmp_path / "set", preparation, settings_in(tmp_path))
    counts = made.lineage["steps"]["toxicity"]
    assert (counts["rows"], counts["dropped"]) == (len(toxic), len(toxic) * (what == "drop"))
    assert made.lineage["rows"]["train"] == len(texts) - counts["dropped"]
    listed = [line.split(",")[2] for line in (made.folder / "changes.csv").read_text().splitlines()[1:]]
    assert [int(line) for line in listed] == toxic
    assert counts["model"] == "model", "a path of this machine is nobody's business"
