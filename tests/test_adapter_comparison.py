"""What two adapters have learnt, against the matrices written out, and against what PEFT adds to a base."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch
from tiny_models import make_run, model_folder, tokenizer
from transformers.pytorch_utils import Conv1D

from qlora_core.adapter_comparison import compare, effective_rank, load_update, short_names, spectrum
from qlora_core.errors import RunError
from qlora_core.worker.loading import adapter_tensors, add_adapter, load_base, trainable_parameters
from qlora_core.worker.results import write_adapter

CPU = torch.device("cpu")
PREFIX = "base_model.model."
SIZES = {
    "layers.0.self_attn.q_proj": (20, 12),
    "layers.0.mlp.up_proj": (12, 30),
    "layers.10.self_attn.q_proj": (20, 12),
}
IN_ORDER = ["layers.0.mlp.up_proj", "layers.0.self_attn.q_proj", "layers.10.self_attn.q_proj"]


def adapter(
    folder: Path, *, seed: int = 0, rank: int = 4, names: Any = SIZES, extra: Any = None, **config: Any
) -> tuple[Path, dict[str, np.ndarray]]:
    """An adapter folder as PEFT saves it, and its updates written out."""
    chance, tensors, updates = np.random.default_rng(seed), {}, {}
    settings = {"r": rank, "lora_alpha": 8, "use_rslora": False} | config
    scale = settings["lora_alpha"] / (math.sqrt(rank) if settings["use_rslora"] else rank)
    for name in names:
        outputs, inputs = SIZES[name]
        a, b = (chance.standard_normal(shape).astype(np.float32) for shape in ((rank, inputs), (outputs, rank)))
        tensors |= {f"{PREFIX}{name}.lora_A.weight": a, f"{PREFIX}{name}.lora_B.weight": b}
        updates[name] = scale * b.astype(np.float64) @ a.astype(np.float64)
    folder.mkdir(parents=True)
    save_file(tensors | (extra or {}), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder, updates


def changed(folder: Path, change: Any) -> Path:
    """The adapter with other tensors: `change` takes and returns the mapping of them."""
    path = folder / "adapter_model.safetensors"
    save_file(change({name: tensor.copy() for name, tensor in load_file(path).items()}), path)
    return folder


def assert_measures(found: dict[str, Any], first: np.ndarray, second: np.ndarray) -> None:
    apart = np.linalg.norm(first - second)
    cosine = np.vdot(first, second) / np.linalg.norm(first) / np.linalg.norm(second)
    assert found["cosine"] == pytest.approx(cosine, abs=1e-12)
    assert found["l2"] == pytest.approx(apart, rel=1e-12)
    assert found["relative"] == pytest.approx(apart / np.linalg.norm(first), rel=1e-12)


@pytest.mark.parametrize("ranks", [(4, 4), (2, 6), (6, 2)])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_similarity_is_that_of_the_matrices_written_out(
    ranks: tuple[int, int], use_rslora: bool, tmp_path: Path
) -> None:
    first, ours = adapter(tmp_path / "a", rank=ranks[0], use_rslora=use_rslora)
    second, theirs = adapter(tmp_path / "b", rank=ranks[1], seed=1)
    found = compare(load_update(first), load_update(second))
    assert [(m["layer"], m["module"]) for m in found.modules] == [(0, "up_proj"), (0, "q_proj"), (10, "q_proj")]
    for entry, name in zip(found.modules, IN_ORDER, strict=True):
        assert_measures(entry, ours[name], theirs[name])
    whole = (np.concatenate([updates[name].ravel() for name in IN_ORDER]) for updates in (ours, theirs))
    assert_measures(found.overall, *whole)


@pytest.mark.parametrize("apart", [1e-3, 1e-9])
def test_nearly_equal_updates_are_told_apart(apart: float, tmp_path: Path) -> None:
    """Of squared norms and the inner product alone, no digit of 1e-9 would be left."""
    first, _ = adapter(tmp_path / "a")
    second, _ = adapter(tmp_path / "b", lora_alpha=8 * (1 + apart))
    found = compare(load_update(first), load_update(second)).overall
    assert found["relative"] == pytest.approx(apart, rel=1e-6) and found["cosine"] == pytest.approx(1, abs=1e-12)
    itself = compare(load_update(first), load_update(first)).overall
    assert itself["l2"] == itself["relative"] == 0 and itself["cosine"] == pytest.approx(1, abs=1e-12)


def test_singular_values_and_effective_rank_are_those_of_the_update(tmp_path: Path) -> None:
    folder, updates = adapter(tmp_path / "a", rank=3)
    for entry, name in zip(spectrum(load_update(folder)), IN_ORDER, strict=True):
        expected = np.linalg.svd(updates[name], compute_uv=False)[:3]
        np.testing.assert_allclose(entry["singular_values"], expected, rtol=1e-12)
        assert entry["norm"] == pytest.approx(np.linalg.norm(updates[name]))
        shares = expected / expected.sum()
        assert entry["effective_rank"] == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)))
    assert effective_rank([2.0, 2.0, 2.0, 0.0]) == pytest.approx(3) and effective_rank([5.0]) == pytest.approx(1)


def test_an_adapter_that_has_learnt_nothing_is_like_no_other(tmp_path: Path) -> None:
    """B is zero, or [B, -B0]·[A; A0] cancels: nothing but rounding is left, which is no direction."""
    first, _ = adapter(tmp_path / "a")
    nothing = [adapter(tmp_path / "b", lora_alpha=0)[0]]
    back = adapter(tmp_path / "c", rank=8)[0]
    for name, part in [(name, part) for name in SIZES for part in "AB"]:
        key = f"{PREFIX}{name}.lora_{part}.weight"

        def cancel(tensors: Any, key: str = key, axis: int = "AB".index(part)) -> Any:
            half = np.split(tensors[key], 2, axis)[0]
            return tensors | {key: np.concatenate([half, half * (1 if axis == 0 else -1)], axis)}

        changed(back, cancel)
    for empty in map(load_update, (*nothing, back)):
        found = compare(empty, load_update(first))
        assert found.overall["cosine"] is None and found.overall["relative"] is None and found.overall["l2"] > 0
        assert all(entry["effective_rank"] is None and entry["norm"] == 0 for entry in spectrum(empty))
        assert compare(empty, empty).overall == {"cosine": None, "l2": 0, "relative": None}
        json.dumps([found.to_json(), spectrum(empty)], allow_nan=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_in_16_bits_are_read(dtype: torch.dtype, tmp_path: Path) -> None:
    folder, _ = adapter(tmp_path / "a")
    path = folder / "adapter_model.safetensors"
    rounded = {name: torch.from_numpy(tensor).to(dtype) for name, tensor in load_file(path).items()}
    save_torch(rounded, path)
    for module in load_update(folder).modules.values():
        for part, found in (("A", module.a), ("B", module.b)):
            expected = rounded[f"{PREFIX}{module.name}.lora_{part}.weight"].float().numpy()
            np.testing.assert_array_equal(found.astype(np.float32), expected)


def test_each_module_has_the_rank_and_scale_that_its_patterns_say(tmp_path: Path) -> None:
    folder, updates = adapter(tmp_path / "a", rank=4)
    narrow, _ = adapter(tmp_path / "b", rank=2, seed=3)
    tensors = {name: t for name, t in load_file(narrow / "adapter_model.safetensors").items() if ".0.self_attn" in name}
    changed(folder, lambda all_: all_ | tensors)
    patterns = {"rank_pattern": {r".*\.0\.self_attn.q_proj": 2}, "alpha_pattern": {r".*\.0\.self_attn.q_proj": 6}}
    for use_rslora in (False, True):
        settings = {"r": 4, "lora_alpha": 8, "use_rslora": use_rslora} | patterns
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        found = load_update(folder).modules
        scales = {name: (len(module.a), module.scale) for name, module in found.items()}
        root = math.sqrt if use_rslora else float
        other = (4, pytest.approx(8 / root(4)))
        assert scales == {IN_ORDER[0]: other, IN_ORDER[1]: (2, pytest.approx(6 / root(2))), IN_ORDER[2]: other}


def test_names_are_short_and_tell_a_layers_modules_apart() -> None:
    """GPT-2 has two of the name c_proj in each layer."""
    gpt2 = [f"transformer.h.{n}.{end}" for n in (0, 1) for end in ("attn.c_attn", "attn.c_proj", "mlp.c_proj")]
    assert list(short_names(gpt2).values()) == 2 * ["c_attn", "attn.c_proj", "mlp.c_proj"]
    # Two kinds of layer that call different modules alike, experts, and a head.
    mixed = [
        "m.0.conv.out_proj",
        "m.1.attn.out_proj",
        "m.1.mlp.experts.0.up",
        "m.1.mlp.experts.1.up",
        "m.0.down",
        "head",
    ]
    assert list(short_names(mixed).values()) == [
        "conv.out_proj", "attn.out_proj", "0.up", "1.up", "down", "head"
    ]  # fmt: skip
    assert short_names(["h", "a.h"]) == {"h": "h", "a.h": "a.h"}


def test_modules_that_one_has_not_are_named_and_not_compared(tmp_path: Path) -> None:
    both, ours = adapter(tmp_path / "a")
    one, theirs = adapter(tmp_path / "b", names=["layers.0.self_attn.q_proj"])
    found = compare(load_update(both), load_update(one))
    assert len(found.modules) == 1 and not found.only_in_second
    assert found.to_json()["only_in_first"] == ["layers.0.mlp.up_proj", "layers.10.self_attn.q_proj"]
    assert_measures(found.overall, ours["layers.0.self_attn.q_proj"], theirs["layers.0.self_attn.q_proj"])
    other, _ = adapter(tmp_path / "c", names=["layers.0.mlp.up_proj"])
    with pytest.raises(RunError, match="no module in common"):
        compare(load_update(one), load_update(other))


def test_modules_of_other_sizes_are_all_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _ = adapter(tmp_path / "a")
    for name in ("layers.0.mlp.up_proj", "layers.10.self_attn.q_proj"):
        monkeypatch.setitem(SIZES, name, (12, 31))
    wider, _ = adapter(tmp_path / "b")
    with pytest.raises(RunError, match=r"up_proj \(12 x 30 and 12 x 31\), layers.10.self_attn.q_proj .* one base"):
        compare(load_update(plain), load_update(wider))


@pytest.mark.parametrize(
    ("config", "init", "reason"),
    [
        ({"use_dora": True}, "default", "DoRA learns magnitudes too"),
        ({"init_lora_weights": True}, "loftq", "does not save that start"),
        ({"init_lora_weights": "loftq"}, "default", "does not save that start"),
        (
            {"init_lora_weights": "pissa_niter_16"},
            "pissa",
            "its start, init_lora_weights 'pissa_niter_16', is still in it",
        ),
    ],
)
def test_what_is_not_the_learnt_update_alone_is_refused(config: Any, init: str, reason: str, tmp_path: Path) -> None:
    folder, _ = adapter(tmp_path / "run-7" / "adapter", **config)
    with pytest.raises(RunError, match=f"^run-7: .*{reason}"):
        load_update(folder, init_lora_weights=init)


def test_damage_is_named_all_at_once(tmp_path: Path) -> None:
    folder, _ = adapter(tmp_path / "a", extra={"base_model.model.norm.weight": np.ones(3, np.float32)})
    up, query = (f"{PREFIX}{name}.lora" for name in IN_ORDER[:2])

    def damage(tensors: Any) -> Any:
        tensors[f"{up}_A.weight"][1, 2] = np.nan
        return {name: tensor for name, tensor in tensors.items() if name != f"{query}_B.weight"}

    with pytest.raises(RunError) as caught:
        load_update(changed(folder, damage))
    assert len(caught.value.problems) == 3
    for told in ("norm.weight are no LoRA", "q_proj have no A and B of one rank", "up_proj.lora_A.weight hold numbers"):
        assert told in str(caught.value)


@pytest.mark.parametrize("kind", ["missing", "cut off", "no weights", "other type", "no alpha"])
def test_a_folder_that_is_no_adapter_is_refused_in_words(kind: str, tmp_path: Path) -> None:
    folder, _ = adapter(tmp_path / "a", names=[] if kind == "no weights" else SIZES)
    weights = folder / "adapter_model.safetensors"
    match kind:
        case "missing":
            weights.unlink()
        case "cut off":
            weights.write_bytes(weights.read_bytes()[:-8])
        case "other type":
            changed(folder, lambda tensors: tensors | {"n": np.arange(3)})
        case "no alpha":
            (folder / "adapter_config.json").write_text('{"r": 4}')
    with pytest.raises(RunError, match="cannot be read as an adapter|holds no LoRA matrices"):
        load_update(folder)


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("llama", {"use_rslora": True}),
        ("gpt2", {}),  # holds its weights transposed
        ("llama", {"init_lora_weights": "pissa", "use_rslora": True}),
        ("gpt2", {"init_lora_weights": "pissa"}),
        ("llama", {"init_lora_weights": "olora"}),
        ("llama", {"init_lora_weights": "orthogonal"}),
    ],
)
def test_the_update_is_what_a_runs_adapter_adds_to_the_original_base(
    architecture: str, config: dict[str, Any], tmp_path: Path
) -> None:
    """PiSSA and OLoRA begin with a part of the base, which is no part of what was learnt."""
    run = make_run(tmp_path, base_model=str(model_folder(architecture)), target_modules="all", **config)

    def base() -> Any:
        return load_base(model_folder(architecture), run.config(), device=CPU, dtype="fp32")

    model = add_adapter(base(), run.config(), base_name="tiny")
    takes_part_of_the_base = config.get("init_lora_weights") in ("pissa", "olora")
    start = {name: tensor.clone() for name, tensor in adapter_tensors(model).items()}
    write_adapter(run, model, tokenizer(), initial=start if takes_part_of_the_base else None)
    untrained = spectrum(load_update(run.adapter, init_lora_weights=run.config().init_lora_weights))
    largest = max(float(tensor.abs().max()) for tensor in start.values())
    assert len(untrained) == 8 + 6 * (architecture == "llama") and max(e["norm"] for e in untrained) < 1e-5 * largest

    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in trainable_parameters(model):
            parameter.add_(0.05 * torch.randn_like(parameter))
    write_adapter(run, model, tokenizer(), initial=start if takes_part_of_the_base else None)
    update = load_update(run.adapter, init_lora_weights=run.config().init_lora_weights)
    original = base()
    before = {name: original.get_submodule(name).weight.clone() for name in update.modules}
    merged = PeftModel.from_pretrained(original, run.adapter).merge_and_unload()
    for name, module in update.modules.items():
        added = (merged.get_submodule(name).weight - before[name]).detach().numpy()
        added = added.T if isinstance(merged.get_submodule(name), Conv1D) else added
        np.testing.assert_allclose(module.scale * module.b @ module.a, added, atol=2e-5)
        assert np.linalg.norm(added) > 0.01
