"""A run -> what its card rests on, read once: settings, base, rows, result, events. Writes no text."""

import json
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qlora_core import events
from qlora_core.config import TrainConfig, replace
from qlora_core.data.hub_source import PREFIX, HubDataset
from qlora_core.data.locate import LINEAGE
from qlora_core.data.prepared_set import place_of
from qlora_core.data.stored import StoredDataset
from qlora_core.errors import LabError, RunError
from qlora_core.models import BaseModel
from qlora_core.runs import Run, RunStore

ADAPTER, MERGED = "adapter", "merged"
ORIGINAL, DEQUANTIZED = "original", "dequantized"


@dataclass(frozen=True)
class Base:
    """`hub_id` is None for a folder or a merged run of this machine; `words` say then what it is."""

    name: str
    hub_id: str | None
    revision: str | None
    origin: str
    weights_sha256: str | None
    was_4_bit: bool
    made_from: str | None = None


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the sections of one card say, and of what."""

    run: Run
    what: str
    onto: str | None
    repo_id: str
    version: str | None
    config: TrainConfig
    dataset: StoredDataset
    result: dict[str, Any]
    history: tuple[events.Event, ...]
    base: Base

    @property
    def info(self) -> dict[str, Any]:
        return self.result["run_info"]

    @property
    def found(self) -> dict[str, Any]:
        return self.result["train_info"]

    @property
    def name(self) -> str:
        return self.repo_id.rpartition("/")[2] or self.config.run_name()

    @cached_property
    def before(self) -> dict[str, Any]:
        """{"loss", "tokens"} of the base without the adapter, as far as it was evaluated."""
        return self._evaluation(0) if self.run.trains else {}

    @cached_property
    def after(self) -> dict[str, Any]:
        """The same of the adapter that was kept."""
        step = self.found.get("adapter_step")
        return {} if step == 0 and self.run.trains else self._evaluation(step)

    def _evaluation(self, step: int | None) -> dict[str, Any]:
        return next((one for one in self.found.get("eval_losses", ()) if one["step"] == step), {})

    def score(self, step: int | None) -> dict[str, Any]:
        return next((one for one in self.found.get("scores", ()) if one["step"] == step), {})

    @cached_property
    def hub_datasets(self) -> list[HubDataset]:
        """Where rows came from the Hub, also on the way of a prepared set."""
        named = [self.dataset.origin.get("source"), *(one.get("hub") for one in self.lineage.get("sources", ()))]
        named += [part.dataset().origin.get("source") for part in parts_of(self.run) if part]
        found = []
        for text in named:
            if isinstance(text, str) and text.startswith(PREFIX):
                with suppress(LabError):
                    found.append(HubDataset.parse(text))
        return list(dict.fromkeys(found))

    @cached_property
    def lineage(self) -> dict[str, Any]:
        """lineage.json of the prepared set that the run was started from, where it is still the same one; else empty."""
        folder, version = Path(self.config.data).expanduser(), self.dataset.origin.get("version")
        if not isinstance(version, int):
            return {}
        for path in (folder, place_of(folder, version)):
            with suppress(OSError, ValueError):
                told = json.loads((path / LINEAGE).read_text(encoding="utf-8"))
                if told.get("fingerprint") == self.dataset.origin.get("fingerprint"):
                    return told
        return {}

    @cached_property
    def since(self) -> dict[str, Any]:
        """{"version", "rows_added", "rows_removed"} against the prepared set's last version; empty where that is not known."""
        return self.dataset.origin.get("since_last_version") or self.lineage.get("since_last_version") or {}

    @property
    def public_config(self) -> TrainConfig:
        """The settings without what only this machine has: folders become names."""

        def named(value: str | None) -> str | None:
            return value if not value or value.startswith(PREFIX) else Path(value).name or "data"

        base = self.base.hub_id or self.base.name
        if self.base.hub_id and self.base.revision:
            base += f"@{self.base.revision}"
        return replace(
            self.config, data=named(self.config.data), eval_data=named(self.config.eval_data),
            base_model="bundled" if self.base.was_4_bit else base,
        )  # fmt: skip


def parts_of(run: Run) -> list[Run | None]:
    """The runs whose adapters a combination adds up, None for one that is gone; empty for a run that trained."""
    found: list[Run | None] = []
    for part in (run.combination() or {"parts": ()})["parts"]:
        known = None
        with suppress(LabError):
            known = RunStore(run.settings).get(part["run_id"])
        found.append(known)
    return found


def gather(run: Run, *, what: str, onto: str | None, repo_id: str, version: str | None) -> Facts:
    """Raises RunError where the run has nothing to publish, or `what` and `onto` do not fit it."""
    if what not in (ADAPTER, MERGED):
        raise RunError(f"a card is of {ADAPTER!r} or {MERGED!r}, not of {what!r}")
    if run.analysis():
        raise RunError(f"{run.run_id}: compares the runs of a study, so it has no model; publish one of those runs")
    result = run.result()
    if result is None:
        raise RunError(f"{run.run_id}: has no result yet; publish it when it has ended")
    config = run.config()
    onto = None if what == ADAPTER else onto or (DEQUANTIZED if config.method == "qlora" else ORIGINAL)
    if onto not in (None, ORIGINAL, DEQUANTIZED) or (onto == DEQUANTIZED and config.method != "qlora"):
        raise RunError(f"{run.run_id}: cannot be merged onto {onto!r}; its method is {config.method}")
    return Facts(
        run=run, what=what, onto=onto, repo_id=repo_id, version=version, config=config, dataset=run.dataset(), result=result,
        history=tuple(run.history()), base=_base(run.base_model(), result["run_info"]["base_model"]),
    )  # fmt: skip


def _base(model: BaseModel, told: dict[str, Any]) -> Base:
    was_4_bit = model.origin.startswith("bundled")
    on_hub = was_4_bit or model.origin == "Hugging Face Hub"
    return Base(
        name=model.name,
        hub_id=model.name if on_hub else None,
        revision=model.revision,
        origin=model.origin,
        weights_sha256=told.get("weights_sha256"),
        was_4_bit=was_4_bit,
        made_from=None if on_hub else _made_from(model.folder),
    )


def _made_from(folder: Path) -> str | None:
    """The Hub's id at the root of merged runs that were trained one on the other."""
    for _ in range(20):
        try:
            parent = BaseModel.from_json(json.loads((folder.parent / "model.json").read_text()))
        except (OSError, ValueError, TypeError, KeyError):
            return None
        if parent.origin.startswith(("bundled", "Hugging Face Hub")):
            return parent.name
        folder = parent.folder
    return None
