"""Facts -> the front matter of a card, as the Hub reads it; and what of a card's front matter the Hub would refuse."""

import logging
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml

from qlora_core.model_card.facts import MERGED, Facts
from qlora_core.model_card.licences import HUB_LICENCES, licence_fields
from qlora_core.model_card.markdown import plain

TAG = "qlora-lab"
# https://huggingface.co/docs/hub/model-cards#specifying-a-base-model
RELATIONS = ("adapter", "merge", "quantized", "finetune")
_REPO = re.compile(r"([\w.-]{1,96}/)?[\w.-]{1,96}", re.ASCII)
_DATASET_TYPE = re.compile(r"(?:[\w-]+/)?[\w.-]+", re.ASCII)
_LONGEST_CARD = 1_000_000
_SCORES = {
    "exact": ("exact_match", "Answers equal to the reference"),
    "json": ("accuracy", "Answers of valid JSON that agree"),
}


def metadata(facts: Facts, *, licence: str | None) -> dict[str, Any]:
    """Front matter in the order of reading. A base that is not on the Hub is left out of it; the card's text says what it is."""
    combined = facts.run.combination() is not None
    relation = ("merge" if combined else "finetune") if facts.what == MERGED else "adapter"
    front: dict[str, Any] = {
        "library_name": "transformers" if facts.what == MERGED else "peft",
        "pipeline_tag": "text-generation",
    }
    if facts.base.hub_id:
        front |= {"base_model": facts.base.hub_id, "base_model_relation": relation}
    front |= licence_fields(licence)
    if facts.hub_datasets:
        front["datasets"] = list(dict.fromkeys(source.repo_id for source in facts.hub_datasets))
    front["tags"] = [
        TAG,
        "lora",
        *(["qlora"] if facts.config.method == "qlora" else []),
        *(["dora"] if facts.config.use_dora else []),
    ]
    if metrics := _metrics(facts):
        front["model-index"] = [{"name": plain(facts.name), "results": [
            {"task": {"type": "text-generation", "name": "Text generation"}, "dataset": _dataset(facts), "metrics": metrics}
        ]}]  # fmt: skip
    return front


def _dataset(facts: Facts) -> dict[str, Any]:
    """The rows that were held out, by what they are of."""
    source = facts.hub_datasets[0] if facts.hub_datasets and not facts.config.eval_data else None
    if source:
        # Held out of that split, not the dataset's own split of that name: so without `split`.
        told = {"name": source.repo_id, "type": source.repo_id, "config": source.config, "revision": source.revision}
        return {name: value for name, value in told.items() if value}
    rows = facts.dataset
    file_name = rows.eval_source if facts.config.eval_data else rows.origin.get("name") or rows.file_name
    return {"name": plain(file_name) or "rows of a file", "type": slug(file_name)}


def slug(text: str) -> str:
    """A dataset's type for one that is not on the Hub."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", plain(text).rpartition(".")[0] or plain(text)).strip("-")[:80] or "rows"


def _metrics(facts: Facts) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    loss = facts.after.get("loss")
    if loss is not None and math.isfinite(loss):
        found.append({"type": "loss", "name": "Evaluation loss, nats a token", "value": round(loss, 6)})
        if (perplexity := perplexity_of(loss)) is not None:
            found.append({"type": "perplexity", "name": "Perplexity", "value": round(perplexity, 4)})
    score = facts.score(facts.found.get("adapter_step"))
    if score.get("total"):
        kind, name = _SCORES.get(score["name"], ("accuracy", "Task score"))
        found.append(
            {"type": kind, "name": f"{name}, of {score['total']}", "value": round(score["correct"] / score["total"], 6)}
        )
    return found


def perplexity_of(loss: float) -> float | None:
    """None beyond what anyone reads as a perplexity."""
    return math.exp(loss) if loss < 30 else None


# -- checks


def validate(text: str) -> list[str]:
    """What the Hub would refuse or read otherwise in this README.md, each a sentence with the remedy; empty where nothing.

    Parsed by huggingface_hub's own ModelCard, which asks nobody; then by the rules of the Hub that it does not know.
    """
    from huggingface_hub import ModelCard
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    if len(text) > _LONGEST_CARD:
        return [f"the card has {len(text):,} characters; keep it below {_LONGEST_CARD:,}"]
    block = REGEX_YAML_BLOCK.search(text)
    if not block:
        return ["the card does not begin with its front matter; begin it with a line ---, the metadata, and a line ---"]
    try:
        # A few lines of them can stand for more than memory holds.
        if any(
            isinstance(token, (yaml.AliasToken, yaml.AnchorToken)) for token in yaml.scan(block[2], yaml.SafeLoader)
        ):
            return ["the front matter uses aliases (& and *); write the values out"]
        with _quiet():
            card = ModelCard(text)
        front = (
            yaml.safe_load(block[2]) or {}
        )  # as it stands there: ModelCard makes a list of letters of a text as tags
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, yaml.YAMLError) as error:
        return [f"the front matter cannot be read: {plain(error, most=300)}"]
    problems = _licence_problems(front) + _id_problems(front) + _index_problems(front.get("model-index") or [])
    if not card.text.strip():
        problems.append("nothing stands below the front matter; write what the model is")
    return problems


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("huggingface_hub.repocard")
    was, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was


def _licence_problems(front: dict[str, Any]) -> list[str]:
    licence = front.get("license")
    if licence is None:
        return []
    names = licence if isinstance(licence, list) else [licence]
    wrong = [name for name in names if name not in HUB_LICENCES]
    problems = [
        f"license {plain(name)!r} is no licence of the Hub; write other, and its name as license_name" for name in wrong
    ]
    if licence == "other" and not front.get("license_name"):
        problems.append("license is other, so license_name must say which")
    return problems


def _id_problems(front: dict[str, Any]) -> list[str]:
    problems = []
    for field, page in (("base_model", "models"), ("datasets", "datasets")):
        value = front.get(field)
        for name in value if isinstance(value, list) else [] if value is None else [value]:
            if not isinstance(name, str) or not _REPO.fullmatch(name) or ".." in name or "--" in name:
                problems.append(
                    f"{field} {plain(name)!r} is no id of the Hub's {page}; leave it out and say it in words"
                )
    relation = front.get("base_model_relation")
    if relation is not None and relation not in RELATIONS:
        problems.append(f"base_model_relation is {plain(relation)!r}; choose one of {', '.join(RELATIONS)}")
    tags = front.get("tags")
    if tags is not None and not (isinstance(tags, list) and all(isinstance(tag, str) for tag in tags)):
        problems.append("tags must be a list of texts")
    return problems


def _index_problems(index: list[dict[str, Any]]) -> list[str]:
    problems = []
    for result in (result for model in index for result in model["results"]):
        kind = result["dataset"]["type"]
        if not isinstance(kind, str) or not _DATASET_TYPE.fullmatch(kind):
            problems.append(
                f"the dataset's type {plain(kind)!r} in model-index has other characters than letters, digits, . _ -"
            )
        for metric in result["metrics"]:
            value = metric.get("value")
            if not isinstance(value, (int, float, str)) or (isinstance(value, float) and not math.isfinite(value)):
                problems.append(f"the value of {plain(metric.get('type'))} in model-index is no number")
    return problems
