"""What a card shows for what it says: rows, evaluation, memory and speed, settings, environment. Every figure was measured."""

from collections.abc import Mapping
from typing import Any

from qlora_core import events, precision
from qlora_core.data.rows import counted
from qlora_core.model_card.facts import DEQUANTIZED, ORIGINAL, Facts
from qlora_core.model_card.markdown import code, fenced, folded, prose, table, yaml_of
from qlora_core.model_card.metadata import perplexity_of
from qlora_core.wording import loss, seconds, size

DASH = "–"
_SCORES = {"exact": "answers equal to the reference", "json": "answers of valid JSON that agree"}
_DRIFT = {
    "loss": "loss, nats a token",
    "perplexity": "perplexity",
    "kl": "KL divergence, nats a token",
    "top1": "same most likely token",
    "logits": "logits, relative error",
}
_ONTO = {ORIGINAL: "merged onto the original 16-bit base", DEQUANTIZED: "merged onto the dequantised 4-bit base"}


def data_section(facts: Facts) -> str:
    rows, origin = facts.dataset, facts.dataset.origin
    told = [
        ("file", code(rows.file_name)),
        ("form", code(rows.form)),
        ("rows trained on", f"{facts.found['train_rows']:,}" if facts.run.trains else "none here; see the parts above"),
        ("rows evaluated on", f"{facts.found['eval_rows']:,}, {code(rows.eval_source)}"),
        ("fingerprint, training rows", code(rows.train_fingerprint)),
        ("fingerprint, evaluation rows", code(rows.eval_fingerprint)),
    ]
    for source in facts.hub_datasets:
        told.append(("from the Hub", code(source)))
    if origin.get("version"):
        told.append(("prepared set", f"{code(origin.get('name'))}, version {code(origin['version'])}"))
        told.append(("fingerprint, prepared set", code(origin.get("fingerprint"))))
    told.append(("since its last version", _since(facts)))
    parts = [table(("of the rows", ""), told)]
    if not facts.run.trains:
        parts.append("These are the rows of the first part, on whose evaluation rows the sum was evaluated.")
    remarks = [f"- {prose(remark)}" for remark in rows.remarks()]
    if facts.found.get("rows_cut"):
        most = facts.config.max_seq_length
        remarks.append(f"- {counted(facts.found['rows_cut'], 'row')} longer than {most:,} tokens were cut")
    for name, which in (("rows_left_out", "training"), ("eval_rows_left_out", "evaluation")):
        if left_out := facts.found.get(name):
            remarks.append(f"- {counted(len(left_out), which + ' row')} without a token to learn were left out")
    parts += ["\n".join(remarks)] if remarks else []
    if facts.lineage:
        parts.append(_lineage(facts.lineage))
    parts.append(
        "Fingerprints are SHA-256 over the rows in their order, so that whoever has the rows can tell whether they are these."
    )
    return "\n\n".join(parts)


def _since(facts: Facts) -> str:
    since = facts.since
    if since:
        return f"{since['rows_added']:,} rows added, {since['rows_removed']:,} removed, against version {code(since['version'])}"
    return "the first version" if facts.lineage else "not known"


def _lineage(lineage: Mapping[str, Any]) -> str:
    """Sources and steps of a prepared set."""
    sources = table(
        ("source", "from", "usable rows", "licence", "SHA-256"),
        [
            (
                code(one.get("name")), code(one.get("hub") or "a file"), code(one.get("rows")),
                code(one.get("license") or "unknown"), code(one.get("sha256")),
            )
            for one in lineage.get("sources", ())
        ],
    )  # fmt: skip
    steps = table(
        ("step", "counts"),
        [
            (code(name), ", ".join(f"{code(what)} {code(value)}" for what, value in counts.items()) or DASH)
            for name, counts in lineage.get("steps", {}).items()
        ],
    )
    return folded("Sources of the prepared set, and what was done to them", f"{sources}\n\n{steps}")


# -- evaluation


def evaluation_section(facts: Facts, *, drift: Mapping[str, Any] | None, curve: str | None) -> str:
    before, after = facts.before, facts.after
    score_before, score_after = facts.score(0), facts.score(facts.found.get("adapter_step"))
    header = ("on the evaluation rows", "base model, as trained on", "with the adapter")
    rows = [("loss, nats a token", loss(before.get("loss")), loss(after.get("loss")))]
    rows.append(("perplexity", _perplexity(before.get("loss")), _perplexity(after.get("loss"))))
    if score_before or score_after:
        name = _SCORES.get((score_after or score_before)["name"], "task score")
        rows.append((name, _score(score_before), _score(score_after)))
    base = precision.words(facts.config) if facts.config.method == "qlora" else "16 bits"
    parts = [
        table(header, rows),
        f"The adapter is that of step {facts.found.get('adapter_step')}; the base was held in {prose(base)}. Losses are sums over "
        f"the {code(after.get('tokens') or before.get('tokens') or 'unknown')} supervised tokens of all "
        f"{facts.found['eval_rows']:,} evaluation rows, divided by their number; intervals are Wilson's, 95 %.",
    ]
    if curve:
        parts.append(f"![Training and evaluation loss by step]({curve})")
    if facts.onto:
        parts.append(_merge(facts, drift or {}))
    if guardrails := facts.result.get("guardrails"):
        parts += ["### Guardrails", _guardrails(guardrails)]
    return "\n\n".join(parts)


def _perplexity(value: float | None) -> str:
    found = None if value is None else perplexity_of(value)
    return DASH if found is None else f"{found:.2f}"


def _score(score: Mapping[str, Any]) -> str:
    if not score.get("total"):
        return DASH
    low, high = score["interval_95"]
    return f"{score['correct']:,} of {score['total']:,} [{low:.0%}, {high:.0%}]"


def _merge(facts: Facts, drift: Mapping[str, Any]) -> str:
    """`drift`: way of merging -> {"loss", "kl", "top1" …}, against the model that was trained."""
    said = f"This model is {_ONTO[facts.onto or ORIGINAL]}."
    if facts.onto == DEQUANTIZED:
        said += (
            " That base is what 4 bits left of the original, in 16 bits again: the one that the adapter was trained on."
        )
    elif facts.config.method == "qlora":
        said += " The adapter was trained on that base in 4 bits, so the two do not fit quite."
    ways = {name: values for name, values in drift.items() if isinstance(values, Mapping)}
    if not ways:
        return f"### Merge\n\n{said} How far it drifts from the model that was trained was not measured."
    names = list(dict.fromkeys(name for values in ways.values() for name in values))
    rows = []
    for way, values in ways.items():
        this = " (this one)" if way == facts.onto else ""
        rows.append((_ONTO.get(way, code(way)) + this, *(_drifted(name, values.get(name)) for name in names)))
    header = ("against the model that was trained", *(_DRIFT.get(name) or code(name) for name in names))
    return f"### Merge\n\n{said}\n\n{table(header, rows)}"


def _drifted(name: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return DASH if value is None else code(value)
    return f"{value:.1%}" if name == "top1" else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _guardrails(found: Any) -> str:
    """A list of flat objects is a table; anything else stands as it was recorded."""
    if isinstance(found, list) and found and all(isinstance(one, dict) for one in found):
        names = list(dict.fromkeys(name for one in found for name in one))
        return table([code(name) for name in names], [[code(one.get(name, "")) for name in names] for one in found])
    return fenced(yaml_of({"guardrails": found}), "yaml")


# -- cost


def cost_section(facts: Facts) -> str:
    found = facts.found
    on_gpu = found.get("peak_allocated_bytes") is not None
    begun = next((one for one in reversed(facts.history) if isinstance(one, events.Started)), None)
    estimated = size(begun.estimated_peak_bytes) if begun else DASH
    quartiles = found.get("step_seconds_quartiles")
    spread = f" (middle half {seconds(quartiles[0])} to {seconds(quartiles[-1])})" if quartiles else ""
    speed = found.get("tokens_per_second")
    told = [("device", code(facts.info["device"]))]
    if on_gpu:
        told += [
            ("peak GPU memory allocated, training", size(found["peak_allocated_bytes"])),
            ("peak GPU memory reserved, training", size(found.get("peak_reserved_bytes"))),
            ("peak GPU memory allocated, loading", size(found.get("load_peak_allocated_bytes"))),
        ]
    told += [
        ("peak host memory of the process, training", size(found.get("peak_host_bytes"))),
        ("peak host memory of the process, loading", size(found.get("load_peak_host_bytes"))),
        (f"estimated before the run, {'GPU' if on_gpu else 'host'}", f"{estimated} (an estimate)" if begun else DASH),
        ("step time, median", seconds(found.get("step_seconds_median")) + spread),
        ("tokens a second", DASH if speed is None else f"{speed:,.0f}"),
        ("steps", f"{found['steps']:,} of {found['total_steps']:,}"),
        ("trainable parameters", f"{found['trainable_parameters']:,}"),
        ("adapter", size(found.get("adapter_bytes"))),
    ]  # fmt: skip
    return table(("measured", ""), told)


# -- settings and environment


def settings_section(facts: Facts) -> str:
    values = facts.public_config.to_json()
    said = "All settings of the run; folders of the machine are named by their last part alone."
    return f"{said}\n\n{folded('Settings as YAML', fenced(yaml_of(values), 'yaml'))}"


def environment_section(facts: Facts) -> str:
    info, base = facts.info, facts.base
    driver = info.get("driver")
    packages = ", ".join(f"{code(name)} {code(version)}" for name, version in info.get("packages", {}).items())
    told = [
        ("run", code(facts.run.run_id)),
        ("device", code(info["device"])),
        ("driver, CUDA", f"{code(driver[0])}, {code(driver[1])}" if driver else "none"),
        ("Python", code(info.get("python"))),
        ("packages", packages or DASH),
        ("git commit of QLoRA Lab", code(info.get("git_commit") or "not known: no checkout")),
        ("number type of products", code(info.get("compute_dtype"))),
        ("template", code(info.get("template"))),
        ("base weights, SHA-256", code(base.weights_sha256 or "not known")),
        *((f"path, {name}", code(reason)) for name, reason in info.get("path", {}).items()),
    ]
    return table(("of the run", ""), told)
