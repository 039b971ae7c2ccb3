"""A run -> the README.md of its model on the Hub, with the pictures that belong to it. Pushes nothing, measures nothing."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_core.errors import RunError
from qlora_core.model_card import evidence, figures
from qlora_core.model_card.facts import ADAPTER, DEQUANTIZED, Facts, gather
from qlora_core.model_card.licences import licence_section, of_data, of_model
from qlora_core.model_card.loading_code import in_4_bits, loading_code
from qlora_core.model_card.markdown import code, fenced, front_matter, prose, table
from qlora_core.model_card.metadata import metadata, validate
from qlora_core.runs import Run
from qlora_core.study_charts.frame import hues
from qlora_core.study_numbers import Arm, arms, losses, memory_kind
from qlora_core.study_results import StudyResults
from qlora_core.verdicts import verdicts
from qlora_core.wording import METHOD_NAMES, loss, seconds, size

IMAGES = "images"
BUNDLED_LICENCE = "apache-2.0"  # as the page of SmolLM2-135M-Instruct has it


@dataclass(frozen=True, kw_only=True)
class CardText:
    """What a person says of the model; an empty text leaves the card's own words. Shown as plain paragraphs and "- " lists.

    `notes`: anything else, in a section of its own. `license`: the model's, by its Hub id; else the strictest that is known of
    rows and base. `base_license`: the base's, as its page has it.
    """

    intended_use: str = ""
    limits: str = ""
    bias: str = ""
    misuse: str = ""
    notes: str = ""
    license: str = ""
    base_license: str = ""


@dataclass(frozen=True)
class Card:
    """README.md, and the PNG files that it shows by their path in the repository."""

    text: str
    images: dict[str, bytes] = field(default_factory=dict)

    def write(self, folder: Path) -> list[Path]:
        """Put README.md and the pictures into the folder; returns what was written."""
        written = []
        for name, content in {"README.md": self.text.encode("utf-8"), **self.images}.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            written.append(path)
        return written


def model_card(
    run: Run,
    *,
    what: str,
    repo_id: str,
    version: str | None = None,
    onto: str | None = None,
    study: StudyResults | None = None,
    drift: Mapping[str, Any] | None = None,
    text: CardText | None = None,
) -> Card:
    """`what`: "adapter" or "merged"; `onto`: which base it was merged onto, by default the one that it was trained on.

    `drift`: "original" and "dequantized" -> what was measured of each merge against the model that was trained: "loss", "kl",
    "top1" (a share), "rows", "tokens". The same run, study and texts give the same bytes. Raises RunError.
    """
    text = text or CardText()
    facts = gather(run, what=what, onto=onto, repo_id=repo_id, version=version)
    base_licence = text.base_license or (BUNDLED_LICENCE if facts.base.was_4_bit else None)
    licence = text.license or of_model(of_data(run), base_licence)
    images, curve = {}, None
    if picture := figures.loss_curve(facts.history, method=facts.config.method):
        curve = f"{IMAGES}/loss.png"
        images[curve] = picture
    sections = {
        "": _summary(facts),
        "How to load it": _loading(facts),
        "Intended use": prose(text.intended_use) or _intended_use(facts),
        "Limits": prose(text.limits) or _limits(facts),
        "Bias": prose(text.bias) or _bias(facts),
        "Misuse": prose(text.misuse) or _misuse(),
        "Notes": prose(text.notes),
        "Evaluation": evidence.evaluation_section(facts, drift=drift, curve=curve),
    }
    if study:
        (
            sections["LoRA against QLoRA" if study.kind == "lora-vs-qlora" else "Compared with other settings"],
            pictures,
        ) = _study(study, run)
        images |= pictures
    sections |= {
        "Data": evidence.data_section(facts),
        "Licence": licence_section(run, named=licence, base=base_licence, base_name=code(facts.base.name)),
        "Memory and speed": evidence.cost_section(facts),
        "Settings": evidence.settings_section(facts),
        "Environment": evidence.environment_section(facts),
    }
    body = [f"## {title}\n\n{content}" if title else content for title, content in sections.items() if content]
    card = Card("\n\n".join([front_matter(metadata(facts, licence=licence)), *body]) + "\n", images)
    if problems := validate(card.text):  # the Hub would say so only after the weights are sent
        raise RunError(*(f"{run.run_id}: its card: {problem}" for problem in problems))
    return card


# -- what it is


def _summary(facts: Facts) -> str:
    config, base = facts.config, facts.base
    method = METHOD_NAMES[config.method]
    version = f", version {code(facts.version)}" if facts.version else ""
    adapter = f"{method} adapter" + ("" if facts.run.combination() else f" of rank {config.rank}")
    kind = f"A {adapter} for" if facts.what == ADAPTER else f"A model made by merging a {adapter} into"
    paragraphs = [f"# {code(facts.name)}{version}", f"{kind} {_base_words(facts)}."]
    if base.was_4_bit:
        paragraphs.append(
            "Its base weights were 4-bit once: they were converted from a GGUF file of 4-bit weights (Q4_1), not taken from "
            f"{code(base.name)} on the Hub, whose own weights answer a little otherwise. Losses here are of the converted ones."
        )
    if combination := facts.run.combination():
        paragraphs += _combination(combination)
    if facts.result["meta_info"].get("ended") == "stopped":
        paragraphs.append(
            f"The run was stopped by a person after {facts.found['steps']:,} of {facts.found['total_steps']:,} steps."
        )
    before, after = facts.before.get("loss"), facts.after.get("loss")
    if before is not None and after is not None:
        held_out = f"{facts.found['eval_rows']:,} rows held out"
        paragraphs.append(f"Evaluation loss {loss(before)} before, {loss(after)} after, on {held_out}.")
    paragraphs.append("Made with QLoRA Lab. Every figure on this card was measured, or says that it is an estimate.")
    return "\n\n".join(paragraphs)


def _base_words(facts: Facts) -> str:
    base = facts.base
    if base.hub_id:
        revision = f", revision {code(base.revision)}" if base.revision else ""
        return f"{code(base.hub_id)}{revision}"
    origin = "a merged run" if base.origin.startswith("merged run") else "a local folder"
    made_from = f", which was itself made from {code(base.made_from)}" if base.made_from else ""
    return (
        f"{code(base.name)}, {origin} on the publisher's machine that is not on the Hub under this name{made_from}; its weights "
        f"have the SHA-256 {code(base.weights_sha256 or 'not known')}"
    )


def _combination(combination: Mapping[str, Any]) -> list[str]:
    rows = [
        (code(part["name"]), f"{part['weight']:g}", code(part["rank"]), loss(part["eval_loss"]), code(part["adapter_sha256"]))
        for part in combination["parts"]
    ]  # fmt: skip
    return [
        f"It adds up the adapters of {len(rows)} runs by {code(combination['method'])}, and was not trained on:",
        table(("part", "weight", "rank", "its own evaluation loss", "SHA-256 of its weights"), rows),
    ]


def _loading(facts: Facts) -> str:
    said = []
    if facts.what == ADAPTER and not facts.base.hub_id:
        said.append(
            "The base model is needed, and it is not on the Hub under this name: ask the publisher for it, or for the merged "
            "model."
        )
    elif facts.what == ADAPTER and facts.base.was_4_bit:
        said.append(
            "This loads the Hub's own weights of the base, which are near those that the adapter was trained on, not equal."
        )
    if facts.what == ADAPTER and facts.config.method == "qlora" and not in_4_bits(facts):
        said.append(
            "In training some layers of the base were held in fewer bits (see Settings); this loads all of them in 16."
        )
    packages = facts.info.get("packages", {})
    needed = ("transformers", "peft", "bitsandbytes") if facts.what == ADAPTER else ("transformers",)
    said.append(
        "Written for " + ", ".join(f"{name} {code(packages.get(name, 'of any version'))}" for name in needed) + "."
    )
    return "\n\n".join([fenced(loading_code(facts), "python"), *said])


# -- in the card's own words


def _intended_use(facts: Facts) -> str:
    form = code(facts.dataset.form)
    return (
        f"The publisher did not say what it is for. It learnt from rows of one form ({form}), so it is of use, if at all, for "
        "questions like those, asked in the template that comes with its tokenizer. For other uses it was not tested."
    )


def _limits(facts: Facts) -> str:
    rows = facts.found["eval_rows"]
    points = [
        f"It was evaluated on {rows:,} rows of the same kind as it learnt from, and on nothing else; on other text it may be worse "
        "than its base.",
        f"It saw at most {facts.config.max_seq_length:,} tokens of a row.",
        "It can be wrong with confidence, as every language model; an answer is no source.",
    ]
    if rows < 100:
        points.append(f"{rows:,} rows are few: small differences in loss and score are chance.")
    if facts.dataset.eval_rows_also_trained:
        points.append("Some evaluation rows were also trained on, which flatters the loss and the score (see Data).")
    if facts.config.method == "qlora" and facts.onto != DEQUANTIZED:
        points.append("It was trained on a base in 4 bits; on the base in 16 bits it answers a little otherwise.")
    if facts.base.was_4_bit:
        points.append("Its base had lost quality to 4 bits before the training began.")
    return "\n".join(f"- {point}" for point in points)


def _bias(facts: Facts) -> str:
    steps = facts.lineage.get("steps", {})
    looked = [name for name in ("personal data", "toxicity") if name in steps]
    checked = (
        f" Its rows were searched for {' and '.join(looked)} (see Data); that finds only what it knows."
        if looked
        else ""
    )
    return (
        "Neither the base model nor the rows were tested for bias. The model repeats what both hold, and few rows can make one "
        f"view louder.{checked}"
    )


def _misuse() -> str:
    return (
        "Not for decisions about people (health, law, credit, work, housing) without a person who checks each of them; not for "
        "passing its text off as a person's; not for getting at the personal data that its rows may hold."
    )


# -- a study


def _study(study: StudyResults, run: Run) -> tuple[str, dict[str, bytes]]:
    """Markdown, and the pictures that it shows."""
    found = arms(study)
    colours = hues(found)
    told = [
        f"Study {code(study.name)} ({code(study.study_id)}), {len(study.seeds)} seed{'' if len(study.seeds) == 1 else 's'}."
    ]
    if not any(one.run_id == run.run_id for one in study.runs):
        told.append("The run of this card is none of the study's; it is shown for comparison.")
    if study.differences:
        told.append(f"Not quite comparable: {prose('; '.join(study.differences))}.")
    for verdict in verdicts(study)[:1]:
        told.append(f"**{prose(verdict.title)}** {prose(verdict.sentence)} Sureness: {prose(verdict.sureness)}.")
    header = ("setting", "kind of memory", "peak", "step time", "evaluation loss", "finished seeds")
    told.append(table(header, [_arm(arm, run) for arm in found]))
    images = {}
    for name, alt, picture in (
        ("study-costs", "Peak memory, step time and evaluation loss of each setting", figures.costs(found, colours)),
        ("study-losses", "Evaluation loss of each setting by step", figures.study_losses(found, colours)),
    ):
        if picture:
            images[f"{IMAGES}/{name}.png"] = picture
            told.append(f"![{alt}]({IMAGES}/{name}.png)")
    return "\n\n".join(told), images


def _arm(arm: Arm, run: Run) -> tuple[str, ...]:
    this = " (this model)" if any(one.run_id == run.run_id for one in arm.runs) else ""
    if arm.gap:
        return code(arm.label) + this, "–", "–", "–", code(arm.gap), "0"
    ends = list(losses(arm).values())
    return (
        code(arm.label) + this, memory_kind(arm) or "–", size(arm.mean(lambda one: one.peak_bytes)),
        seconds(arm.mean(lambda one: one.step_seconds)), loss(sum(ends) / len(ends) if ends else None), str(len(arm.finished)),
    )  # fmt: skip
