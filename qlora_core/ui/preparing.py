"""The Prepare panel of the Data tab: settings of a preparation -> a job; its outcome as counts, downloads and a push."""

import hashlib
import json
import os
import re
import secrets
import zipfile
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr

from qlora_core import jobs
from qlora_core.data import derived
from qlora_core.data.inspection import DatasetReport
from qlora_core.data.preparation import Preparation
from qlora_core.data.prepared_set import PreparedSet
from qlora_core.errors import ConfigError, LabError
from qlora_core.settings import Settings
from qlora_core.ui.chosen import Chosen, rows_of
from qlora_core.ui.dataset_report import steps_html
from qlora_core.ui.identity import Identity, secret_of
from qlora_core.ui.pushing import Pushing, Wish, repository, target
from qlora_core.ui.uploads import safe_name
from qlora_core.ui.words import esc, problems_panel, size

SPECS = {spec.name: spec for spec in fields(Preparation)}
# Taken over from what is chosen beside the panel.
ELSEWHERE = ("columns", "skip_bad_rows", "base_model", "template", "tokenise")
GROUPS = {
    "rows": "Clean",
    "safety": "Personal data and toxicity",
    "length": "Length",
    "columns": "Columns and balance",
    "split": "Split",
    "card": "Card",
}
# Fields that name a column of the dataset.
COLUMN_FIELDS = ("balance_by", "stratify_by")
LABELS = {
    "normalise": "Normalise line ends and trailing space",
    "duplicates": "Duplicates",
    "near_duplicates": "Near duplicates, similarity",
    "toxicity_model": "Toxicity model",
    "toxicity_threshold": "Toxic from",
    "max_tokens": "Tokens a row may have",
    "derive": "Add columns",
    "balance_by": "Balance by column",
    "balance_shares": "Shares",
    "limit": "Rows at most",
    "eval_fraction": "Held-out share",
    "stratify_by": "Stratify by column",
    "license": "Licence (SPDX)",
}


class PreparePanel:
    """Its components belong to the Data tab, whose outputs it adds to."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        default = Preparation()
        gr.HTML('<div class="lab-step"><i>4</i>Prepare, if you like</div>')
        with gr.Accordion("Clean, mask, balance, split", open=False, elem_id="prepare") as self.box:
            self.inputs = {}
            for number, (group, title) in enumerate(GROUPS.items()):
                names = [n for n, spec in SPECS.items() if spec.metadata["group"] == group and n not in ELSEWHERE]
                gr.HTML(f'<div class="lab-group{"" if number else " first"}">{title}</div>')
                for begin in range(0, len(names), 3):
                    with gr.Row(equal_height=True):
                        for name in names[begin : begin + 3]:
                            self.inputs[name] = _component(name, getattr(default, name))
            with gr.Row(equal_height=True):
                self.name = gr.Textbox(label="Name of the prepared dataset", max_lines=1, elem_id="prepare-name")
                self.begin = gr.Button("Prepare", variant="primary", elem_id="prepare-start")
            self.cancel = gr.Button("Cancel", size="sm", visible=False, elem_id="prepare-cancel")
        self.result = gr.HTML("", elem_id="prepare-result")
        with gr.Accordion(
            "Push this dataset to the Hub", open=False, visible=False, elem_id="push-dataset"
        ) as self.push_box:
            with gr.Row():
                self.repository, self.public = target("set")
            self.pushing = Pushing(settings, "set-push", self.push_wish)

    @property
    def outputs(self) -> list[Any]:
        return [
            self.name,
            self.result,
            self.push_box,
            self.begin,
            self.cancel,
            *(self.inputs[name] for name in COLUMN_FIELDS),
        ]

    def connect(self, tab: Any, base_model: gr.Dropdown, identity: Identity, hidden: dict[str, Any]) -> None:
        """`tab` is the DataTab that the panel stands on."""
        given = [tab.chosen, self.name, tab.rows.fields["template"], base_model, *self.inputs.values()]
        inputs = [identity.token, *given]

        def begin(
            signed_in: gr.OAuthToken | None,
            typed: str,
            chosen: Chosen,
            name: str,
            template: str,
            base_model: str,
            *values: Any,
        ) -> dict[Any, Any]:
            try:
                arguments = self.arguments(chosen, name, template, base_model, values)
            except LabError as error:
                return {tab.problems: "", self.result: problems_panel(error.problems, title="Not prepared yet")}
            token = secret_of(typed, signed_in) if any(part.startswith("hub:") for part in arguments) else None
            return tab._watch(jobs.start(arguments, self.settings, secret=token, again=True), chosen)

        self.pushing.connect([tab.chosen, self.repository, self.public], identity, hidden)
        in_sight = [self.inputs[name] for name in COLUMN_FIELDS]
        self.box.expand(self.choices_now, tab.chosen, in_sight, **hidden)
        self.begin.click(begin, inputs, tab.outputs, **hidden)
        self.cancel.click(tab.cancel_job, tab.job, tab.outputs, **hidden)

    def arguments(
        self, chosen: Chosen, name: str, template: str, base_model: str, values: tuple[Any, ...]
    ) -> list[str]:
        """The command line that does it. Raises ConfigError naming all that is wrong."""
        if not chosen.path:
            raise ConfigError("no dataset is chosen; choose one above")
        given = {key: value for key, value in zip(self.inputs, values, strict=True) if value not in ("", None)}
        given |= {"columns": chosen.columns, "skip_bad_rows": chosen.skip_bad_rows}
        given |= {"template": template, "base_model": base_model}
        sources = [chosen.path]
        if chosen.is_prepared:  # again from what it was made of, read as it was read
            made = PreparedSet.load(Path(chosen.path))
            sources, before = made.sources(), made.lineage["preparation"]
            given |= {name: before[name] for name in ("columns", "skip_bad_rows")}
        preparation = Preparation.from_mapping(given, where="Prepare")
        out = self.settings.home / "datasets" / safe_name(name or chosen.name)
        return ["prepare", *sources, "--out", str(out), "--json", *command_options(preparation)]

    def of(self, chosen: Chosen, report: DatasetReport) -> dict[Any, Any]:
        """What the panel shows of the dataset that has been chosen."""
        columns = dict(zip((self.inputs[name] for name in COLUMN_FIELDS), self._choices(report), strict=True))
        if not chosen.is_prepared:
            stem = re.sub(r"\.(jsonl|ndjson|json|csv|tsv|parquet|gz)", "", chosen.name)
            return {
                self.name: f"{safe_name(stem)}-prepared",
                self.result: "",
                self.push_box: gr.Accordion(visible=False),
            }
        made = PreparedSet.load(Path(chosen.path))
        links = zip_link(made, self.settings)
        return {
            self.name: made.lineage["name"],
            self.result: f'<div class="lab-step">What was done</div>{steps_html(made)}<p class="lab-links">{links}</p>',
            self.push_box: gr.Accordion(visible=True),
            **columns,
        }

    def _choices(self, report: DatasetReport) -> list[Any]:
        """The columns that rows can be balanced or split by."""
        there = ["", *dict.fromkeys([*report.ignored_columns, *derived.DERIVED])]
        return [gr.Dropdown(choices=there) for _ in COLUMN_FIELDS]

    def choices_now(self, chosen: Chosen) -> list[Any]:
        """The same, for drop-downs that have just come into sight."""
        try:
            return self._choices(rows_of(chosen, self.settings).report) if chosen.path else [gr.skip(), gr.skip()]
        except (LabError, OSError):
            return [gr.skip() for _ in COLUMN_FIELDS]

    def push_wish(self, chosen: Chosen, name: str, public: bool) -> Wish:
        """Raises ConfigError with all that is missing."""
        problems = [] if chosen.is_prepared else ["no prepared dataset is chosen; prepare one first"]
        try:
            given = [f"--repo-id={repository(name)}", *(["--public"] if public else [])]
        except ConfigError as error:
            problems += error.problems
        if problems:
            raise ConfigError(*problems)
        return Wish(["push", chosen.path, *given], {name.strip(): "dataset"}, not public)


def _component(name: str, value: Any) -> gr.components.Component:
    spec = SPECS[name]
    limits = spec.metadata
    common = {
        "label": LABELS.get(name, name.replace("_", " ").capitalize()),
        "info": limits["help"],
        "elem_id": f"prepare-{name.replace('_', '-')}",
        "min_width": 220,
    }
    if name == "derive":
        choices = [(f"{key.replace('_', ' ')}", key) for key in derived.DERIVED]
        return gr.CheckboxGroup(choices, value=[], **common)
    if "choices" in limits:
        return gr.Radio(list(limits["choices"]), value=value, **common)
    if spec.type is bool:
        return gr.Checkbox(value=value, **common)
    if name in COLUMN_FIELDS:
        return gr.Dropdown([""], value="", allow_custom_value=True, **common)
    if limits.get("optional") or isinstance(value, str):
        return gr.Textbox(value="", placeholder="off" if name != "license" else "unknown", max_lines=1, **common)
    return gr.Number(value=value, step=0.05 if isinstance(value, float) else 1, **common)


def command_options(preparation: Preparation) -> list[str]:
    """Options that differ from the defaults, as the command line takes them."""
    default, options = Preparation().to_json(), []
    for name, value in preparation.to_json().items():
        if value == default[name]:
            continue
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            options.append(option if value else f"--no-{option[2:]}")
        else:
            options.append(f"{option}={','.join(value) if isinstance(value, list) else value}")
    return options


def merge_job(paths: list[Path], settings: Settings, *, columns: str, skip_bad_rows: bool) -> jobs.Job:
    """Several files as one dataset, every row as it is, with its file's name in the column `source`."""
    stems = safe_name("+".join(dict.fromkeys(path.name.partition(".")[0] for path in paths)))[:80]
    # Uploads lie in folders named by their content: other files of the same names are another dataset.
    name = f"{stems}-{hashlib.sha256(json.dumps(sorted(map(str, paths))).encode()).hexdigest()[:6]}"
    preparation = Preparation(
        normalise=False, duplicates="keep", eval_fraction=0, shuffle=False, columns=columns, skip_bad_rows=skip_bad_rows
    )
    out = settings.home / "datasets" / name
    arguments = ["prepare", *map(str, paths), "--out", str(out), "--json", *command_options(preparation)]
    return jobs.start(arguments, settings, again=True)


def zip_link(made: PreparedSet, settings: Settings) -> str:
    """A link to everything of the set that is worth keeping, as one zip below `downloads`."""
    name = f"{made.lineage['name']}-v{made.lineage['version']}.zip"
    target = settings.downloads / f"{made.lineage['fingerprint'][:16]}-{name}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}-{os.getpid()}-{secrets.token_hex(4)}.partial")
        try:
            with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED, compresslevel=3) as archive:
                for path in made.files():
                    archive.write(path, f"{made.lineage['name']}/{path.relative_to(made.folder)}")
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
    return (
        f'<a class="lab-link" download="{esc(name)}" href="gradio_api/file={esc(quote(str(target)))}">'
        f"Download {esc(name)} · {size(target.stat().st_size)}</a>"
    )
