"""What two adapters have learnt, compared layer by layer in the space of their ranks. Reads adapter folders; knows no torch."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file

from qlora_core.errors import RunError
from qlora_core.selectors import layer_number

PREFIX, A, B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
# Singular values below this share of the largest are rounding.
NEGLIGIBLE = 1e-7


@dataclass(frozen=True)
class Module:
    """The learnt update of one linear layer, scale * B·A: A [rank, inputs], B [outputs, rank]. Sums are made in fp64: of two
    nearly equal updates, the difference is a small difference of large numbers."""

    name: str
    a: np.ndarray
    b: np.ndarray
    scale: float

    @property
    def layer(self) -> int | None:
        return layer_number(self.name)

    @property
    def last_name(self) -> str:
        return self.name.rpartition(".")[2]

    @cached_property
    def square(self) -> float:
        """Squared Frobenius norm."""
        return max(self.product(self), 0.0)

    def product(self, other: "Module") -> float:
        """Inner product of both updates, <s·B·A, s'·B'·A'> = s·s'·tr(A·A'^T·B'^T·B): matrices of ranks alone."""
        of_a = self.a.astype(np.float64) @ other.a.T.astype(np.float64)
        of_b = self.b.T.astype(np.float64) @ other.b.astype(np.float64)
        return self.scale * other.scale * float(np.sum(of_a * of_b))

    def singular_values(self) -> np.ndarray:
        """Of scale * B·A, the largest first, as many as the rank: of the triangles of two QR decompositions."""
        triangles = np.linalg.qr(self.b, mode="r") @ np.linalg.qr(self.a.T, mode="r").T
        return abs(self.scale) * np.linalg.svd(triangles, compute_uv=False)


@dataclass(frozen=True)
class Update:
    """All that an adapter has learnt, by the full names of the base's modules."""

    modules: dict[str, Module]


def load_update(adapter: Path) -> Update:
    """The update that the adapter adds to the original base weights. An adapter that began with part of them (PiSSA, OLoRA) is
    saved as one for the original base, so what it began with is subtracted already.

    Raises RunError for DoRA, whose update depends on the base weights, and where the folder is no LoRA adapter.
    """
    try:
        config = json.loads((adapter / "adapter_config.json").read_text())
        tensors = _read(adapter / "adapter_model.safetensors")
    except (OSError, ValueError) as error:
        raise RunError(f"{adapter}: cannot be read as an adapter ({error})") from None
    if config.get("use_dora"):
        raise RunError(f"{adapter.parent.name}: DoRA learns magnitudes too, so its update is not scale x B·A alone")
    names = [name.removeprefix(PREFIX).removesuffix(A) for name in tensors if name.endswith(A)]
    if not names:
        raise RunError(f"{adapter}: holds no LoRA matrices")
    return Update({name: _module(name, tensors, config) for name in sorted(names, key=_order)})


def _read(path: Path) -> dict[str, np.ndarray]:
    with safe_open(path, framework="np") as file:
        kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (no mapping)
    if "BF16" not in kinds:
        return load_file(path)
    return _read_bf16(path)  # numpy has no bf16


def _read_bf16(path: Path) -> dict[str, np.ndarray]:
    """Tensors of a safetensors file (https://huggingface.co/docs/safetensors: a length, a JSON header, the bytes)."""
    data = path.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    found = {}
    for name, told in json.loads(data[8:begin]).items():
        if name == "__metadata__":
            continue
        first, end = told["data_offsets"]
        raw = data[begin + first : begin + end]
        if told["dtype"] == "BF16":  # the upper half of an fp32
            values = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.frombuffer(raw, {"F32": "<f4", "F16": "<f2", "F64": "<f8"}[told["dtype"]])
        found[name] = values.reshape(told["shape"])
    return found


def _module(name: str, tensors: dict[str, np.ndarray], config: dict[str, Any]) -> Module:
    a, b = (tensors[f"{PREFIX}{name}{part}"] for part in (A, B))
    rank, alpha = len(a), _pattern(config, "alpha_pattern", name, config["lora_alpha"])
    return Module(name, a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _pattern(config: dict[str, Any], field: str, name: str, default: float) -> float:
    return next((v for k, v in (config.get(field) or {}).items() if name == k or name.endswith(f".{k}")), default)


def _order(name: str) -> tuple[Any, ...]:
    """Layer 2 before layer 10."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split("."))


@dataclass(frozen=True)
class Similarity:
    """`overall` and each of `modules` hold cosine, l2 and relative: ‖first - second‖ and that over ‖first‖. None where an update
    is zero. `only_in_one`: modules that one of the adapters has not; they are not compared."""

    overall: dict[str, float | None]
    modules: list[dict[str, Any]]
    only_in_one: list[str]

    def to_json(self) -> dict[str, Any]:
        return {"overall": self.overall, "modules": self.modules, "only_in_one": self.only_in_one}


def compare(first: Update, second: Update) -> Similarity:
    """Raises RunError where a module has other sizes in both, or they have none in common."""
    shared = [name for name in first.modules if name in second.modules]
    pairs = [(first.modules[name], second.modules[name]) for name in shared]
    wrong = [one.name for one, other in pairs if one.a.shape[1] != other.a.shape[1] or len(one.b) != len(other.b)]
    if wrong:
        raise RunError(
            f"adapters of other bases: {', '.join(wrong[:4])} have other sizes; compare adapters of one base"
        )
    if not shared:
        raise RunError("the adapters have no module in common; compare adapters of the same layers")
    sums, modules = (0.0, 0.0, 0.0), []
    for one, other in pairs:
        terms = one.square, other.square, one.product(other)
        sums = tuple(total + term for total, term in zip(sums, terms, strict=True))
        modules.append({"layer": one.layer, "module": one.last_name, **_measures(*terms)})
    alone = [name for name in (*first.modules, *second.modules) if (name in first.modules) != (name in second.modules)]
    return Similarity(_measures(*sums), modules, alone)


def _measures(first: float, second: float, product: float) -> dict[str, float | None]:
    """From both squared norms and the inner product."""
    apart = math.sqrt(max(first + second - 2 * product, 0.0))
    both = math.sqrt(first * second)
    return {
        "cosine": max(-1.0, min(1.0, product / both)) if both else None,
        "l2": apart,
        "relative": apart / math.sqrt(first) if first else None,
    }


def spectrum(update: Update) -> list[dict[str, Any]]:
    """Of each module: Frobenius norm, singular values, and effective rank, exp of the entropy of the singular values over their
    sum (Roy and Vetterli 2007, https://ieeexplore.ieee.org/document/7098875); None for a zero update."""
    return [_spectrum(module) for module in update.modules.values()]


def _spectrum(module: Module) -> dict[str, Any]:
    values = module.singular_values()
    return {
        "layer": module.layer,
        "module": module.last_name,
        "norm": float(np.linalg.norm(values)),
        "effective_rank": effective_rank(values),
        "singular_values": [float(value) for value in values],
    }


def effective_rank(values: Iterable[float]) -> float | None:
    found = np.asarray(list(values))
    found = found[found > NEGLIGIBLE * found.max(initial=0.0)]
    if not len(found):
        return None
    shares = found / found.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))
