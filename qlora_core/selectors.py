"""How settings name linear layers: module names, groups, each in a range of decoder layers. Knows names alone, no setting."""

import re
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

QUERY = ("q_proj", "query", "q", "q_lin")
KEY = ("k_proj", "key", "k", "k_lin")
VALUE = ("v_proj", "value", "v", "v_lin")
# Layers in which query, key and value are one matrix: they cannot be had apart.
FUSED_QKV = ("c_attn", "query_key_value", "qkv_proj", "Wqkv", "in_proj")
ALL = ("all", "all-linear")
GROUPS = (*ALL, "attention", "mlp", "query-value", "key-value")
# Parts of the names of modules that hold an MLP's layers, and last names of layers that lie in no such module (OPT's).
MLP_PARTS, MLP_NAMES = ("mlp", "ffn", "feed_forward", "moe", "expert"), ("fc1", "fc2")


class Selector(NamedTuple):
    """`what` is a group, or a module's name or the end of it; `first` and `last` are decoder layers, inclusive, or None."""

    what: str
    first: int | None = None
    last: int | None = None

    def __str__(self) -> str:
        if self.first is None:
            return self.what
        return f"{self.what}@{self.first}" + (f"-{self.last}" if self.last != self.first else "")


def parse(text: str) -> Selector:
    """ "q_proj", "attention", "all@0-3" or "mlp@5". Raises ValueError saying what is wrong and how it is written."""
    what, at, numbers = text.partition("@")
    if not what.strip():
        raise ValueError(f"{text!r} names no layers; write all{at}{numbers} for all of them")
    if not at:
        return Selector(what.strip())
    found = re.fullmatch(r"\s*([0-9]{1,9})\s*(?:-\s*([0-9]{1,9})\s*)?", numbers)
    if not found:
        raise ValueError(f"{text!r} has no range of layers after @; write {what}@0-7, or {what}@5 for one layer")
    first, last = int(found[1]), int(found[2] or found[1])
    if last < first:
        raise ValueError(f"{text!r} ends before it begins; write {what}@{last}-{first}")
    return Selector(what.strip(), first, last)


def syntax_problem(given: str | Sequence[str]) -> str | None:
    """What no model could make sense of, of every selector; None where there is nothing."""
    problems = []
    for text in as_list(given):
        try:
            parse(text)
        except ValueError as error:
            problems.append(str(error))
    return "; ".join(problems) or None


def as_list(given: str | Sequence[str]) -> list[str]:
    """A setting's value, a group by itself or several selectors, as a list."""
    return [given] if isinstance(given, str) else list(given)


def find(given: str | Sequence[str], names: Sequence[str], grouped: Collection[str]) -> tuple[set[str], list[str]]:
    """(names of the layers that are meant, why some of it means none). `names`: full names of a model's linear layers;
    `grouped`: those that groups consist of, as a group leaves out what cannot be had."""
    found: set[str] = set()
    missing, problems = [], []
    layers = [number for name in names if (number := layer_number(name)) is not None]
    for selector in map(parse, as_list(given)):
        if selector.what in GROUPS:
            meant = [name for name in names if name in grouped and in_group(name, selector.what)]
        else:
            meant = [name for name in names if name == selector.what or name.endswith(f".{selector.what}")]
        if not meant and selector.what in GROUPS:
            problems.append(f"{selector.what} fits none of the model's linear layers")
        elif not meant and selector.what in (*QUERY, *KEY, *VALUE) and (fused := fused_names(names)):
            problems.append(f"the model has no {selector.what} by itself: query, key and value are one matrix, {fused}")
        elif not meant:
            missing.append(selector.what)
        elif selector.first is not None and selector.last > max(layers, default=-1):
            problems.append(f"{selector} goes beyond the model's decoder layers, {_numbered(layers)}")
        elif selector.first is not None:
            within = [name for name in meant if (number := layer_number(name)) is not None]
            within = [name for name in within if selector.first <= layer_number(name) <= selector.last]
            if not within:
                problems.append(f"{selector} fits none: {selector.what} lies in other layers")
            found.update(within)
        else:
            found.update(meant)
    if missing:
        problems.insert(0, f"the model has no linear layer {', '.join(missing)}")
    return found, problems


def in_group(name: str, group: str) -> bool:
    """Whether the layer of that full name belongs to the group. Where query, key and value are one matrix, it stands for each."""
    *parents, last = name.split(".")
    in_attention = any("attn" in part or "attention" in part for part in parents)
    is_fused = in_attention and last in FUSED_QKV
    match group:
        case "attention":
            return in_attention
        case "mlp":
            inside = last in MLP_NAMES or any(word in part for part in parents for word in MLP_PARTS)
            return inside and not in_attention
        case "query-value":
            return is_fused or last in (*QUERY, *VALUE)
        case "key-value":
            return is_fused or last in (*KEY, *VALUE)
    return group in ALL


def layer_number(name: str) -> int | None:
    """The decoder layer of a module: the first number in its name; None for one outside the layers."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def last_names(names: Iterable[str]) -> list[str]:
    """The last parts of full names, each once."""
    return sorted({name.rpartition(".")[2] for name in names})


def fused_names(names: Sequence[str]) -> str:
    """Last names of the matrices that hold query, key and value at once; empty where there are none."""
    in_attention = [name for name in names if in_group(name, "attention")]
    return ", ".join(name for name in last_names(in_attention) if name in FUSED_QKV)


def _numbered(layers: Sequence[int]) -> str:
    return f"{min(layers)} to {max(layers)}" if layers else "of which it has none"
