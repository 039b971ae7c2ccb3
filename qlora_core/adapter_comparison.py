"""What two adapters have learnt, compared layer by layer in the space of their ranks. Reads adapter folders; knows no torch."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from qlora_core.blas import one_thread
from qlora_core.errors import RunError
from qlora_core.selectors import layer_number

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, A, B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
# PEFT's starts (init_lora_weights in adapter_config.json) that add nothing to the base, and take nothing from it.
BEGIN_AT_ZERO = (True, "gaussian", "orthogonal", "eva")
# What is left of a sum that cancels is rounding below this share of its terms. Sums are made in fp64.
ROUNDING = 1e-13
# Of a matrix that are multiplied at once.
COLUMNS = 512
SHOWN_NAMES = 6
LOFTQ = (
    "LoftQ begins with what 4 bits lost and does not save that start, so what was learnt cannot be told from it; compare "
    "runs with another init_lora_weights"
)


@dataclass(frozen=True)
class Module:
    """The learnt update of one linear layer, scale * B·A: A [rank, inputs], B [outputs, rank], as they are stored."""

    name: str
    a: np.ndarray
    b: np.ndarray
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """Of the layer's weight: outputs, inputs."""
        return len(self.b), self.a.shape[1]

    def singular_values(self) -> np.ndarray:
        """Of scale * B·A, the largest first, as many as the rank: those of the product of two QR triangles, rank x rank."""
        of_b, of_a = (np.linalg.qr(matrix.astype(np.float64), mode="r") for matrix in (self.b, self.a.T))
        of_b *= self.scale
        values = np.linalg.svd(of_b @ of_a.T, compute_uv=False)
        values[values < ROUNDING * np.linalg.norm(of_b) * np.linalg.norm(of_a)] = 0
        return values


@dataclass(frozen=True)
class Update:
    """All that an adapter has learnt, by the full names of the base's modules, in the order of the layers."""

    modules: dict[str, Module]


def load_update(adapter: Path, *, init_lora_weights: str = "default") -> Update:
    """The update that an adapter folder, as PEFT saves it, adds to the original base weights: of each module scale * B·A, where
    the scale is alpha / rank, or alpha / sqrt(rank) for rsLoRA (https://arxiv.org/abs/2312.03732).

    `init_lora_weights`: the setting of the run, since the folder does not tell LoftQ. A run saves what PiSSA and OLoRA have learnt
    as [B, -B0]·[A; A0], of twice the rank (worker/results.py), so their start is subtracted already. The file stays mapped: its
    pages are read when they are needed.

    Raises RunError with all that is wrong: DoRA, LoftQ, a start that is not subtracted, tensors that are no LoRA matrices of
    linear layers, numbers that are not finite, and a folder that cannot be read.
    """
    where = adapter.parent.name
    try:
        config = json.loads((adapter / CONFIG).read_text())
        tensors = _read(adapter / WEIGHTS)
        alpha, init = config["lora_alpha"], config.get("init_lora_weights", True)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise RunError(
            f"{adapter}: cannot be read as an adapter ({type(error).__name__}: {error}); make it again"
        ) from None
    problems = []
    if config.get("use_dora"):
        problems.append(
            f"{where}: DoRA learns magnitudes too, so its update is not scale x B·A alone; compare runs without"
        )
    elif init_lora_weights == "loftq" or init == "loftq":
        problems.append(f"{where}: {LOFTQ}")
    elif init not in BEGIN_AT_ZERO:
        problems.append(
            f"{where}: its start, init_lora_weights {init!r}, is still in it, so it is not what was learnt alone; save it as an "
            "adapter of the original base"
        )
    if problems or (problems := _problems(where, tensors)):
        raise RunError(*problems)
    names = sorted((name.removeprefix(PREFIX).removesuffix(A) for name in tensors if name.endswith(A)), key=_order)
    modules = {}
    for name in names:
        a, b = (tensors[f"{PREFIX}{name}{part}"] for part in (A, B))
        scaled = _pattern(config.get("alpha_pattern") or {}, name, alpha)
        modules[name] = Module(name, a, b, scaled / (math.sqrt(len(a)) if config.get("use_rslora") else len(a)))
    return Update(modules)


def _read(path: Path) -> dict[str, np.ndarray]:
    """Tensors of a safetensors file (https://huggingface.co/docs/safetensors: a length, a JSON header, the bytes), mapped.
    safetensors itself cannot give bf16 to numpy; here it becomes fp32."""
    with safe_open(path, framework="np"):  # refuses a header that does not fit the file
        data = np.memmap(path, np.uint8, "r").view(np.ndarray)
    begin = 8 + int.from_bytes(data[:8].tobytes(), "little")
    found = {}
    for name, told in json.loads(data[8:begin].tobytes()).items():
        if name == "__metadata__":
            continue
        if told["dtype"] not in DTYPES:
            raise ValueError(f"{name} is of type {told['dtype']}")
        first, end = (begin + offset for offset in told["data_offsets"])
        values = data[first:end].view(DTYPES[told["dtype"]])
        if told["dtype"] == "BF16":  # the upper half of an fp32
            values = (values.astype(np.uint32) << 16).view(np.float32)
        found[name] = values.reshape(told["shape"])
    return found


def _problems(where: str, tensors: Mapping[str, np.ndarray]) -> list[str]:
    """Why these are not the matrices A and B of linear layers, all of them and nothing else."""
    others = [name for name in tensors if not (name.startswith(PREFIX) and name.endswith((A, B)))]
    stems = {name.removesuffix(A).removesuffix(B) for name in tensors if name not in others}
    pairs = {stem: (tensors.get(stem + A), tensors.get(stem + B)) for stem in stems}
    odd = [
        stem
        for stem, (a, b) in pairs.items()
        if a is None or b is None or a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1] or not len(a)
    ]
    infinite = [name for name, tensor in tensors.items() if name not in others and not _is_finite(tensor)]
    found = []
    if others:
        found.append(
            f"{where}: {_listed(others)} are no LoRA matrices of linear layers, so its update is not scale x B·A alone"
        )
    if odd:
        found.append(f"{where}: {_listed(odd)} have no A and B of one rank; its adapter is damaged")
    if infinite:
        found.append(
            f"{where}: {_listed(infinite)} hold numbers that are not finite; train it again, with a lower learning_rate"
        )
    if not tensors:
        found.append(f"{where}: its adapter holds no LoRA matrices")
    return found


def _is_finite(tensor: np.ndarray) -> bool:
    return not tensor.size or (math.isfinite(tensor.min()) and math.isfinite(tensor.max()))


def _pattern(patterns: Mapping[str, float], name: str, default: float) -> float:
    """As PEFT reads rank_pattern and alpha_pattern: the first whose expression fits the name's end."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def _order(name: str) -> tuple[Any, ...]:
    """Layer 2 before layer 10."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split("."))


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Full name -> as much of its end as tells a layer's modules apart: "q_proj"; GPT-2's "attn.c_proj" and "mlp.c_proj"."""
    paths = {name: _without_number(name) for name in names}
    ends = Counter(path[start:] for path in set(paths.values()) for start in range(len(path)))
    return {
        name: ".".join(next((path[at:] for at in reversed(range(len(path))) if ends[path[at:]] == 1), path))
        for name, path in paths.items()
    }


def _without_number(name: str) -> tuple[str, ...]:
    """The parts of a name, the same in every decoder layer."""
    parts = name.split(".")
    at = next((at for at, part in enumerate(parts) if part.isdigit()), None)
    return tuple(parts if at is None else parts[:at] + parts[at + 1 :])


@dataclass(frozen=True)
class Similarity:
    """`overall`, of all modules that both have, and each of `modules` hold cosine, l2 and relative: ‖first - second‖, and that over
    ‖first‖; None where that is undefined, as an update is zero. Modules that only one adapter has are named, by full names, and
    not compared."""

    overall: dict[str, float | None]
    modules: list[dict[str, Any]]
    only_in_first: list[str]
    only_in_second: list[str]

    def to_json(self) -> dict[str, Any]:
        return {
            "overall": self.overall,
            "modules": self.modules,
            "only_in_first": self.only_in_first,
            "only_in_second": self.only_in_second,
        }


@one_thread()
def compare(first: Update, second: Update) -> Similarity:
    """Adapters of one base, whatever their ranks. Of each pair of modules only matrices of the ranks' size are made: 8B with rank
    64 on all linear layers takes 4 seconds on 2 CPU cores, and 40 MiB beside the files (examples/benchmarks/adapters.py).

    Raises RunError where modules are of other sizes in both, or the adapters have none in common.
    """
    shared = [name for name in first.modules if name in second.modules]
    wrong = [
        f"{name} ({_size(first.modules[name])} and {_size(second.modules[name])})"
        for name in shared
        if first.modules[name].shape != second.modules[name].shape
    ]
    if wrong:
        raise RunError(f"adapters of other bases: {_listed(wrong)} differ in size; compare adapters of one base")
    if not shared:
        raise RunError("the adapters have no module in common; compare adapters of the same layers")
    names = short_names([*first.modules, *second.modules])
    sums, modules = np.zeros(4), []
    for name in shared:
        terms = _terms(first.modules[name], second.modules[name])
        sums += terms
        modules.append({"layer": layer_number(name), "module": names[name], **_measures(*terms)})
    return Similarity(
        overall=_measures(*sums.tolist()),
        modules=modules,
        only_in_first=[name for name in first.modules if name not in second.modules],
        only_in_second=[name for name in second.modules if name not in first.modules],
    )


def _size(module: Module) -> str:
    return " x ".join(map(str, module.shape))


def _terms(one: Module, other: Module) -> tuple[float, float, float, float]:
    """‖U‖², ‖V‖², <U, V> and ‖U - V‖² of U = B·A and V = D·C (scales within B and D). With <B·A, D·C> = tr(B^T·D · C·A^T), all are
    sums over matrices of the ranks' size.

    U - V = E·A + D·F with E = B - D and F = A - C, so that nearly equal updates are told apart to more digits than
    ‖U‖² + ‖V‖² - 2<U, V> has.
    """
    rank = max(len(one.a), len(other.a))
    of_b = _inner_products(one.b.T, other.b.T, rank, (one.scale, other.scale))
    of_a = _inner_products(one.a, other.a, rank, (1.0, 1.0))
    apart = of_b[2, 2] * of_a[0, 0] + 2 * of_b[2, 1] * of_a[0, 2] + of_b[1, 1] * of_a[2, 2]
    product = float(np.sum(of_b[0, 1] * of_a[0, 1]))
    return _total(of_b[0, 0] * of_a[0, 0]), _total(of_b[1, 1] * of_a[1, 1]), product, _total(apart)


def _inner_products(first: np.ndarray, second: np.ndarray, rank: int, scales: tuple[float, float]) -> np.ndarray:
    """[3, 3, rank, rank], in fp64: at i, j the inner products of the rows of i with those of j, where 0 is `first`, 1 is `second`,
    each scaled and with zeros up to that rank, and 2 is their difference. Columns are taken a few at a time: their fp64 copies
    stay small."""
    sums = np.zeros((3 * rank, 3 * rank))
    for begin in range(0, first.shape[1], COLUMNS):
        rows = np.zeros((3, rank, min(COLUMNS, first.shape[1] - begin)))
        for at, (matrix, scale) in enumerate(zip((first, second), scales, strict=True)):
            rows[at, : len(matrix)] = matrix[:, begin : begin + COLUMNS]
            rows[at] *= scale
        np.subtract(rows[0], rows[1], out=rows[2])
        flat = rows.reshape(3 * rank, -1)
        sums += flat @ flat.T
    return sums.reshape(3, rank, 3, rank).swapaxes(1, 2)


def _total(terms: np.ndarray) -> float:
    """The sum; 0 where nothing but rounding is left, as of [B, -B0]·[A; A0] that has learnt nothing."""
    total = float(terms.sum())
    return total if total > ROUNDING * float(np.abs(terms).sum()) else 0.0


def _measures(first: float, second: float, product: float, apart: float) -> dict[str, float | None]:
    both = math.sqrt(first) * math.sqrt(second)
    return {
        "cosine": max(-1.0, min(1.0, product / both)) if both else None,
        "l2": math.sqrt(apart),
        "relative": math.sqrt(apart / first) if first else None,
    }


@one_thread()
def spectrum(update: Update) -> list[dict[str, Any]]:
    """Of each module: layer, module, Frobenius norm, singular values (as many as the rank) and effective rank."""
    names, found = short_names(update.modules), []
    for name, module in update.modules.items():
        values = module.singular_values()
        found.append({
            "layer": layer_number(name),
            "module": names[name],
            "norm": float(np.linalg.norm(values)),
            "effective_rank": effective_rank(values),
            "singular_values": values.tolist(),
        })  # fmt: skip
    return found


def effective_rank(values: Sequence[float] | np.ndarray) -> float | None:
    """Of singular values: exp of the entropy of their shares of their sum, from 1 to their number (Roy and Vetterli 2007, "The
    effective rank: a measure of effective dimensionality", EUSIPCO); None where all are zero."""
    positive = np.asarray(values, dtype=np.float64)
    positive = positive[positive > 0]
    if not len(positive):
        return None
    shares = positive / positive.sum()
    return float(np.exp(-np.sum(shares * np.log(shares))))


def _listed(names: Sequence[str]) -> str:
    more = len(names) - SHOWN_NAMES
    return ", ".join(names[:SHOWN_NAMES]) + (f" and {more:,} more" if more > 0 else "")
