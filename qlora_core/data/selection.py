"""Which rows are kept and which are held out: balanced shares, random and stratified splits. Numbers only, no rows."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from qlora_core.errors import DatasetError

# More different numbers than that are put into quarters of equal size before they are stratified by.
MANY_VALUES = 20


def balanced(
    rows: np.ndarray, values: Sequence[str], shares: dict[str, float], random: np.random.Generator
) -> tuple[np.ndarray, Counter[str]]:
    """(the most rows that have those shares of their values, how many of each), in their order.

    Raises DatasetError where a value has no row.
    """
    counts = Counter(values)
    if missing := [value for value in shares if not counts[value]]:
        there = ", ".join(f"{value!r} ({count:,})" for value, count in counts.most_common(12))
        raise DatasetError(*(f"balance_shares: no row has the value {value!r}; there are {there}" for value in missing))
    total = min(counts[value] / share for value, share in shares.items())
    # A hair above, so that 30 % of 100 rows, which floats make 29.999…, are 30.
    wanted = {value: min(counts[value], int(total * share + 1e-6)) for value, share in shares.items()}
    of_value = np.array(values)
    chosen = [random.choice(rows[of_value == value], count, replace=False) for value, count in wanted.items()]
    return rows[np.isin(rows, np.concatenate(chosen))], Counter(wanted)


def held_out(
    digests: np.ndarray, strata: Sequence[str] | None, fraction: float, random: np.random.Generator
) -> np.ndarray:
    """[rows] bool: which rows are held out, at least one and not all. Equal rows go to the same side, or the evaluation
    would ask for what was trained on. Of each stratum its share, as near as whole rows allow.

    Raises DatasetError where fewer than two rows differ.
    """
    _, first, group = np.unique(digests, return_index=True, return_inverse=True)
    if len(first) < 2:
        raise DatasetError("fewer than two different rows are left, so none can be held out; set eval_fraction to 0")
    wanted = min(len(first) - 1, max(1, round(len(first) * fraction)))
    chosen = np.zeros(len(first), bool)
    if strata is None:
        chosen[random.choice(len(first), wanted, replace=False)] = True
    else:
        _, stratum = np.unique(np.array(_bands(strata))[first], return_inverse=True)
        sizes = np.bincount(stratum)
        exact = sizes * wanted / len(first)
        counts = exact.astype(int)
        # What rounding down leaves goes to the strata that lost most by it.
        counts[np.argsort(counts - exact, kind="stable")[: wanted - counts.sum()]] += 1
        for members, count in zip(
            np.split(np.argsort(stratum, kind="stable"), np.cumsum(sizes)[:-1]), counts, strict=True
        ):
            if count:
                chosen[random.choice(members, count, replace=False)] = True
    return chosen[group]


def _bands(values: Sequence[str]) -> list[str]:
    """The values, or the quarter that each lies in where they are many different numbers."""
    if len(set(values)) <= MANY_VALUES:
        return list(values)
    try:
        numbers = np.array([float(value) if value else np.nan for value in values])
    except ValueError:
        return list(values)
    edges = np.nanquantile(numbers, [0.25, 0.5, 0.75])
    quarters = np.searchsorted(edges, numbers, side="right")
    return [f"quarter {quarter + 1}" if value else "" for quarter, value in zip(quarters, values, strict=True)]
