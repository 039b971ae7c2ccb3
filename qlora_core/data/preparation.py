"""What is done to the rows of a dataset before it is trained on: the settings, and what is wrong with them. Does nothing itself."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_core.config import TEMPLATES
from qlora_core.data import derived, near_duplicates
from qlora_core.data.card import is_license_id
from qlora_core.options import SHORT, Options, option

KEPT, FOUND, MASKED, DROPPED, CUT = "keep", "find", "mask", "drop", "cut"


@dataclass(frozen=True, kw_only=True)
class Preparation(Options):
    """What is done to the rows; steps.ORDER is its order. Raises ConfigError naming every wrong field at once."""

    columns: str = option("", "which columns are read: prompt=question, response=answer", group="rows")
    skip_bad_rows: bool = option(False, "leave out rows that have problems (they are listed)", group="rows")
    normalise: bool = option(
        True, "line ends become newlines, white space at ends of lines and texts goes", group="rows"
    )
    personal_data: str = option(
        "keep",
        "find lists rows with e-mail addresses, phone and card numbers, IBANs, IP addresses and national ids; mask replaces "
        "them too",
        choices=(KEPT, FOUND, MASKED),
        group="safety",
    )
    toxicity_model: str | None = option(
        None, "text-classification model, a folder or a Hub id, that rates every row", optional=True, group="safety"
    )
    toxicity_threshold: float = option(0.5, "score from which a row is toxic", above=0, most=1, group="safety")
    toxic_rows: str = option(
        "find", "find lists toxic rows; drop leaves them out", choices=(FOUND, DROPPED), group="safety"
    )
    duplicates: str = option("drop", "rows that are equal to an earlier one", choices=(KEPT, DROPPED), group="rows")
    near_duplicates: float | None = option(
        None,
        "drop rows that are this similar to an earlier one (0.8: four fifths of the runs of five characters are the same)",
        optional=True,
        least=near_duplicates.LOWEST,
        most=1,
        group="rows",
    )
    long_rows: str = option(
        "keep",
        "rows of more than max_tokens: cut shortens the last response, after leaving out later turns",
        choices=(KEPT, DROPPED, CUT),
        group="length",
    )
    max_tokens: int = option(512, "tokens a row may have", least=8, most=131_072, group="length")
    base_model: str = option("bundled", "model whose tokenizer counts, as for training", group="length")
    template: str = option("model", "template the rows are counted in, as for training", group="length")
    derive: tuple[str, ...] = option((), f"columns to add: {', '.join(derived.DERIVED)}", group="columns")
    balance_by: str = option("", "column whose values get the shares below", group="columns")
    balance_shares: str = option("", "human=30, synthetic=40, logs=30; other values are left out", group="columns")
    limit: int | None = option(
        None, "most rows to keep, drawn at random", optional=True, least=2, most=10**9, group="split"
    )
    eval_fraction: float = option(
        0.1, "share of rows held out for evaluation; 0: none", least=0, most=0.5, group="split"
    )
    stratify_by: str = option("", "column whose values are held out in equal shares", group="split")
    shuffle: bool = option(True, "put the rows in random order", group="split")
    seed: int = option(42, "seed of draw, split and order", least=0, most=2**31 - 1, group="split")
    license: str | None = option(None, "licence by its SPDX id, such as cc-by-4.0", optional=True, group="card")
    tokenise: bool = option(False, "make the tokens now, so that a training starts at once", group="card")

    def _combination_problems(self) -> list[str]:
        problems = [
            f"derive: {name!r} is unknown; choose from {', '.join(derived.DERIVED)}" for name in self._unknown()
        ]
        if self.template not in TEMPLATES and "{" not in self.template:
            problems.append(
                f"template is {self.template!r}; choose one of {', '.join(TEMPLATES)}, or write a Jinja template"
            )
        if self.license and not is_license_id(self.license):
            problems.append(
                f"license is {SHORT.repr(self.license)}; write an identifier, such as cc-by-4.0 or apache-2.0"
            )
        if bool(self.balance_by) != bool(self.balance_shares):
            problems.append("balance_by and balance_shares go together: a column, and the shares of its values")
        if self.balance_shares:
            problems += shares_of(self.balance_shares)[1]
        if self.stratify_by and not self.eval_fraction:
            problems.append("stratify_by is set and eval_fraction is 0: nothing is held out; set a share")
        return problems

    @property
    def derived(self) -> tuple[str, ...]:
        """Columns to derive: those asked for, and those that rows are balanced or split by."""
        asked = (*self.derive, self.balance_by, self.stratify_by)
        return tuple(name for name in dict.fromkeys(asked) if name in derived.DERIVED)

    def public(self) -> dict[str, Any]:
        """The settings as they are published: of a folder on this machine no more than its name."""
        told = self.to_json()
        return told | {name: public_name(told[name]) for name in ("base_model", "toxicity_model")}

    def _unknown(self) -> list[str]:
        return [name for name in self.derive if name not in derived.DERIVED]


def public_name(model: str | None) -> str | None:
    """The id of a model on the Hub; of a folder on this machine its name."""
    path = Path(os.path.expanduser(model or ""))
    is_here = model and (path.is_absolute() or model.startswith(("~", ".")) or path.is_dir())
    return path.resolve().name if is_here else model


def shares_of(text: str) -> tuple[dict[str, float], list[str]]:
    """ "human=30, logs=70" -> (shares that add up to 1, problems)."""
    shares, problems = {}, []
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, found, number = (piece.strip() for piece in part.rpartition("="))
        try:
            share = float(number.removesuffix("%"))
        except ValueError:
            share = -1
        if not name or not found or not 0 < share < float("inf"):
            problems.append(f"balance_shares: {part!r} is no value=share; write human=30, synthetic=40, logs=30")
        elif name in shares:
            problems.append(f"balance_shares: {name!r} is given twice")
        else:
            shares[name] = share
    total = sum(shares.values())
    if shares and not problems and not (abs(total - 1) < 0.005 or abs(total - 100) < 0.5):
        problems.append(f"balance_shares add up to {total:g}; make it 100 (or 1)")
    return {name: share / total for name, share in shares.items()} if total else {}, problems
