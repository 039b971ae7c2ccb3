"""Licences of the rows and of the base, as the Hub names them, and what must be said before a model of theirs is published."""

import re
from collections.abc import Iterable

from qlora_core.model_card.facts import parts_of
from qlora_core.model_card.markdown import code, plain, prose
from qlora_core.runs import Run

# https://huggingface.co/docs/hub/repositories-licenses
_HUB = """
    apache-2.0 mit openrail openrail++ bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
    bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0
    cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0
    wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc
    h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl osl-3.0 postgresql ofl-1.1 ncsa unlicense
    zlib pddl lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
    gemma unknown other"""
HUB_LICENCES = frozenset(_HUB.split())
# SPDX ids that the Hub calls otherwise.
_ALIASES = {
    "pddl-1.0": "pddl",
    "odc-by-1.0": "odc-by",
    "odbl-1.0": "odbl",
    "etalab-2": "etalab-2.0",
    "gfdl-1.3": "gfdl",
}
_PERMISSIVE = "apache-2.0 mit bsd bsd-2-clause bsd-3-clause isc cc0-1.0 unlicense wtfpl zlib cdla-permissive-2.0 pddl"
PERMISSIVE = frozenset(_PERMISSIVE.split())
UNKNOWN = "unknown"
_NON_COMMERCIAL = re.compile(r"(^|[^a-z])nc([^a-z]|$)|non[- ]?commercial|research|academic|apple-amlr")
_NO_DERIVATIVES = re.compile(r"(^|[^a-z])nd([^a-z]|$)|no[- ]?deriv")


def licence_names() -> list[str]:
    """What a person may choose from, none first."""
    return ["", *sorted(HUB_LICENCES - {UNKNOWN, "other"})]


def hub_licence(named: str | None) -> str:
    """The Hub's id of a licence; "unknown" where none is named, "other" where the Hub has no id for it."""
    text = plain(named or "").lower()
    text = re.sub(r"-(only|or-later)$|\+$", "", text) if text not in HUB_LICENCES else text
    text = _ALIASES.get(text, text)
    return UNKNOWN if not text else text if text in HUB_LICENCES else "other"


def licence_fields(named: str | None) -> dict[str, str]:
    """Front matter of a licence."""
    found = hub_licence(named)
    name = re.sub(r"[^a-z0-9.-]+", "-", plain(named or "").lower()).strip("-.")[:64]
    return {"license": found} | ({"license_name": name or UNKNOWN} if found == "other" else {})


def of_data(run: Run) -> list[str | None]:
    """Licences of the rows that the run learnt from, each once; None for rows of an unknown one. A combination has those of
    all its parts."""
    if run.combination() is None:
        return [run.config().dataset_license or None]
    return list(dict.fromkeys(part.config().dataset_license or None if part else None for part in parts_of(run)))


def is_non_commercial(named: str) -> bool:
    return bool(_NON_COMMERCIAL.search(named.lower()))


def is_no_derivatives(named: str) -> bool:
    return bool(_NO_DERIVATIVES.search(named.lower()))


def of_model(data: Iterable[str | None], base: str | None) -> str | None:
    """The licence that a card may name for what is made of both: the strictest that is known, or None where one is unknown.

    Which licence a trained model falls under is a question of law that nobody settled; a person can name another.
    """
    known = list(data)
    if None in known:
        return None
    for named in (*known, base):
        if named and is_non_commercial(named):
            return named
    named_by_base = [base] if base and hub_licence(base) not in PERMISSIVE else []
    strict = [named for named in known if named and hub_licence(named) not in PERMISSIVE]
    return ([*strict, *named_by_base] or known)[0]


def licence_warning(run: Run) -> str | None:
    """What a person must confirm before the run's model is published; None where the licences of its rows allow it."""
    return " ".join(licence_problems(of_data(run))) or None


def licence_problems(found: list[str | None]) -> list[str]:
    """What speaks against publishing what is made of rows of these licences, None an unknown one."""
    told = []
    if None in found:
        told.append(
            "The licence of the dataset is unknown. Find out whether what is made of it may be given to others; then name it "
            "where the rows are prepared (`prepare --license`, Data) or the run is made (Train, “Licence of the dataset”)."
        )
    for named in filter(None, found):
        name = plain(named)
        if is_non_commercial(named):
            told.append(
                f"The dataset is non-commercial ({name}): what is trained on it may not be used commercially either, as many "
                "read it."
            )
        if is_no_derivatives(named):
            told.append(
                f"The dataset forbids derived works ({name}): a model trained on it may be one, and then not be published."
            )
    return told


def licence_section(run: Run, *, named: str | None, base: str | None, base_name: str) -> str:
    """Markdown: which licence the card names and why."""
    found = of_data(run)
    lines = [
        f"This model: {code(named)}." if named else "This model: no licence was named, so nobody may rely on one.",
        f"The rows that it learnt from: {', '.join(code(one or 'unknown') for one in found)}.",
        f"Its base model, {base_name}: {code(base) if base else 'see its own page or files; its licence goes on to hold'}.",
    ]
    warnings = "\n".join(f"> **{prose(problem)}**" for problem in licence_problems(found))
    return "\n".join(f"- {line}" for line in lines) + (f"\n\n{warnings}" if warnings else "")
