"""What two adapters have learnt, against the matrices written out."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

from qlora_core.adapter_comparison import compare, effective_rank, load_update, spectrum
from qlora_core.errors import RunError

SIZES = {
    "layers.0.self_attn.q_proj": (20, 12),
    "layers.0.mlp.up_proj": (12, 30),
    "layers.10.self_attn.q_proj": (20, 12),
}


def adapter(
    folder: Path, *, seed: int = 0, rank: int = 4, names: Any = SIZES, **config: Any
) -> tuple[Path, dict[str, np.ndarray]]:
    """An adapter folder as PEFT saves it, and its updates written out."""
    chance, tensors, updates = np.random.default_rng(seed), {}, {}
    settings = {"r": rank, "lora_alpha": 8, "use_rslora": False} | config
    scale = settings["lora_alpha"] / (math.sqrt(rank) if settings["use_rslora"] else rank)
    for name in names:
        outputs, inputs = SIZES[name]
        a, b = (chance.standard_normal(shape).astype(np.float32) for shape in ((rank, inputs), (outputs, rank)))
        tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
        updates[name] = scale * b.astype(np.float64) @ a.astype(np.float64)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder, updates


@pytest.mark.parametrize("ranks", [(4, 4), (2, 6)])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_similarity_is_that_of_the_matrices_written_out(
    ranks: tuple[int, int], use_rslora: bool, tmp_path: Path
) -> None:
    first, ours = adapter(tmp_path / "a", rank=ranks[0], use_rslora=use_rslora)
    second, theirs = adapter(tmp_path / "b", rank=ranks[1], seed=1)
    found = compare(load_update(first), load_update(second))
    assert [(m["layer"], m["module"]) for m in found.modules] == [(0, "up_proj"), (0, "q_proj"), (10, "q_proj")]
    for entry, name in zip(found.modules, ("layers.0.mlp.up_proj", *[n for n in SIZES if "q_proj" in n]), strict=True):
        assert_measures(entry, ours[name], theirs[name])
    assert_measures(
        found.overall, *(np.concatenate([u.ravel() for u in updates.values()]) for updates in (ours, theirs))
    )


def assert_measures(found: dict[str, Any], first: np.ndarray, second: np.ndarray) -> None:
    apart = np.linalg.norm(first - second)
    assert found["cosine"] == pytest.approx(
        np.vdot(first, second) / np.linalg.norm(first) / np.linalg.norm(second), abs=1e-9
    )
    assert found["l2"] == pytest.approx(apart) and found["relative"] == pytest.approx(apart / np.linalg.norm(first))


def test_nearly_equal_updates_are_told_apart(tmp_path: Path) -> None:
    first, _ = adapter(tmp_path / "a")
    second, _ = adapter(tmp_path / "b", lora_alpha=8 * (1 + 1e-5))
    found = compare(load_update(first), load_update(second)).overall
    assert found["relative"] == pytest.approx(1e-5, rel=1e-2) and found["cosine"] == pytest.approx(1, abs=1e-12)


def test_singular_values_and_effective_rank_are_those_of_the_update(tmp_path: Path) -> None:
    folder, updates = adapter(tmp_path / "a", rank=3)
    for entry, name in zip(
        spectrum(load_update(folder)), sorted(updates, key=lambda n: ("10" in n, "q_proj" in n)), strict=True
    ):
        expected = np.linalg.svd(updates[name], compute_uv=False)[:3]
        np.testing.assert_allclose(entry["singular_values"], expected, rtol=1e-5)
        assert entry["norm"] == pytest.approx(np.linalg.norm(updates[name]))
        assert 1 < entry["effective_rank"] <= 3
    assert effective_rank([2.0, 2.0, 2.0, 0.0]) == pytest.approx(3) and effective_rank([5.0]) == pytest.approx(1)


def test_an_adapter_that_has_learnt_nothing_is_like_no_other(tmp_path: Path) -> None:
    first, _ = adapter(tmp_path / "a")
    nothing, _ = adapter(tmp_path / "b", lora_alpha=0)
    found = compare(load_update(nothing), load_update(first))
    assert found.overall["cosine"] is None and found.overall["relative"] is None and found.overall["l2"] > 0
    assert all(entry["effective_rank"] is None for entry in spectrum(load_update(nothing)))
    json.dumps(found.to_json(), allow_nan=False)


def test_bf16_adapters_are_read(tmp_path: Path) -> None:
    folder, _ = adapter(tmp_path / "a")
    path = folder / "adapter_model.safetensors"
    rounded = {name: torch.from_numpy(tensor).bfloat16() for name, tensor in load_file(path).items()}
    save_torch(rounded, path)
    for module in load_update(folder).modules.values():
        for part, found in (("A", module.a), ("B", module.b)):
            expected = rounded[f"base_model.model.{module.name}.lora_{part}.weight"].float().numpy()
            np.testing.assert_array_equal(found, expected)


def test_modules_that_one_has_not_are_named_and_not_compared(tmp_path: Path) -> None:
    both, _ = adapter(tmp_path / "a")
    one, _ = adapter(tmp_path / "b", names=["layers.0.self_attn.q_proj"])
    found = compare(load_update(both), load_update(one))
    assert len(found.modules) == 1 and found.only_in_one == ["layers.0.mlp.up_proj", "layers.10.self_attn.q_proj"]
    other, _ = adapter(tmp_path / "c", names=["layers.0.mlp.up_proj"])
    with pytest.raises(RunError, match="no module in common"):
        compare(load_update(one), load_update(other))


def test_what_cannot_be_compared_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = adapter(tmp_path / "a", use_dora=True)
    with pytest.raises(RunError, match="DoRA learns magnitudes too"):
        load_update(folder)
    with pytest.raises(RunError, match="cannot be read as an adapter"):
        load_update(tmp_path / "nothing")
    plain, _ = adapter(tmp_path / "b")
    monkeypatch.setitem(SIZES, "layers.0.mlp.up_proj", (12, 31))
    wider, _ = adapter(tmp_path / "c")
    with pytest.raises(RunError, match="layers.0.mlp.up_proj have other sizes"):
        compare(load_update(plain), load_update(wider))
