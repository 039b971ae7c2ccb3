"""What can go wrong in a run: memory, numbers, hardware and data. Each ends with a sentence or goes on as if nothing were."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import CHATML, adapter, dataset, eval_losses, losses, make_run, model_folder, said, train_here
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from qlora_core import devices, events
from qlora_core.config import TrainConfig
from qlora_core.errors import ConfigError, DatasetError, DeviceError, ModelError, TrainingError
from qlora_core.run_status import FAILED, FINISHED
from qlora_core.runs import Run
from qlora_core.worker import checkpoints, loading, passes, steps
from qlora_core.worker.batches import Pass, loss_sum

GPU = devices.Gpu("GPU-1", "H100", 80 * devices.GIB, 0, (9, 0))
VALUES = {"max_steps": 8, "eval_steps": 4, "save_steps": 2}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train_here(make_run(tmp_path_factory.mktemp("undisturbed"), **VALUES))


def notes(run: Run) -> list[str]:
    return [event.text for event in said(run, events.Note)]


def assert_same_within_float_error(run: Run, undisturbed: Run) -> None:
    assert run.status().state == FINISHED
    assert losses(run) == pytest.approx(losses(undisturbed), abs=1e-5)
    assert eval_losses(run) == pytest.approx(eval_losses(undisturbed), abs=1e-5)
    expected = adapter(undisturbed)
    for name, tensor in adapter(run).items():
        torch.testing.assert_close(tensor, expected[name], atol=3e-4, rtol=0)


# -- memory


def memory_for(tokens: int, *, checkpointed: int, calls: list[int]) -> Callable[[Any, Pass], torch.Tensor]:
    """A loss_sum on a device that holds passes of `tokens`, or `checkpointed` of them with activation checkpointing."""

    def limited(model: Any, batch: Pass) -> torch.Tensor:
        on = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        calls.append(batch.tokens)
        if batch.tokens > (checkpointed if on else tokens):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return loss_sum(model, batch)

    return limited


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_out_of_memory_halves_the_passes_and_changes_no_result(
    dropout: float, undisturbed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    run = make_run(tmp_path, **VALUES, lora_dropout=dropout)
    monkeypatch.setattr(passes, "loss_sum", memory_for(180, checkpointed=180, calls=calls))
    train_here(run)
    assert notes(run) and all(
        re.fullmatch(r"out of memory: passes of at most \d+ tokens from here on", n) for n in notes(run)
    )
    assert max(calls) > 180 and max(calls[len(calls) // 2 :]) <= 180
    assert run.result()["run_info"]["path"]["memory"].endswith(notes(run)[-1])
    if dropout == 0:
        assert_same_within_float_error(run, undisturbed)


def test_then_activation_checkpointing_is_switched_on(
    undisturbed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, **VALUES)
    monkeypatch.setattr(passes, "loss_sum", memory_for(20, checkpointed=10_000, calls=[]))
    train_here(run)
    assert (
        notes(run)[-1]
        == "out of memory with one row a pass: the activations of 1 of 2 layers are recomputed from here on"
    )
    assert_same_within_float_error(run, undisturbed)


def test_layers_that_cannot_be_recomputed_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    run = make_run(tmp_path, **VALUES, activation_checkpointing="full")
    train_here(run)
    assert run.status().state == FINISHED
    started = said(run, events.Started)[0]
    assert started.checkpointed_layers == 0 and "this architecture cannot recompute" in started.memory_reason
    (tmp_path / "short").mkdir()
    monkeypatch.setattr(passes, "loss_sum", memory_for(20, checkpointed=20, calls=[]))
    with pytest.raises(TrainingError, match="out of memory with one row a pass: the longest row"):
        train_here(make_run(tmp_path / "short", **VALUES))


def test_at_last_it_fails_and_names_the_longest_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = dataset(12)
    rows[6]["completion"] = "long " * 60
    run = make_run(tmp_path, **VALUES, train_rows=rows)
    monkeypatch.setattr(passes, "loss_sum", memory_for(200, checkpointed=200, calls=[]))
    with pytest.raises(
        TrainingError, match=r"the longest row, line 7, has 3\d\d tokens; lower max_seq_length, choose qlora"
    ):
        train_here(run)
    assert run.status().state == FAILED
    assert not said(run, events.Step)  # the warm-up on the longest rows finds it before the first step


def test_an_evaluation_out_of_memory_takes_smaller_passes_too(
    undisturbed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("enough", "too little"):
        (tmp_path / name).mkdir()

    def limit_evaluation(tokens: int) -> None:
        limited = memory_for(tokens, checkpointed=tokens, calls=[])
        monkeypatch.setattr(passes.Passes, "loss_of", lambda self, batch: limited(self.model, batch))

    limit_evaluation(180)
    assert_same_within_float_error(train_here(make_run(tmp_path / "enough", **VALUES)), undisturbed)
    limit_evaluation(30)
    with pytest.raises(
        TrainingError, match=r"out of memory in the evaluation .* the longest row, line \d, has 1\d\d tokens"
    ):
        train_here(make_run(tmp_path / "too little", **VALUES))


def test_the_warm_up_reads_the_longest_pass_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(passes, "loss_sum", memory_for(10**6, checkpointed=10**6, calls=calls))
    for number, values in enumerate(({}, {"token_budget": 150}, {"packing": "off"})):
        calls.clear()
        (tmp_path / str(number)).mkdir()
        train_here(make_run(tmp_path / str(number), **VALUES, **values))
        if values != {"packing": "off"}:  # padding counts there, which `tokens` leaves out
            assert max(calls[:4]) == max(calls)


# -- numbers that are not finite


def assert_nothing_saved_is_spoilt(run: Run) -> None:
    for folder in checkpoints.list_checkpoints(run.path / "checkpoints"):
        assert all(tensor.isfinite().all() for tensor in load_file(folder / "adapter.safetensors").values())
        state = torch.load(folder / "state.pt", weights_only=True)
        assert all(t.isfinite().all() for s in state["optimizer"]["state"].values() for t in s.values())


def at_call(number: int, spoil: Callable[[Any, torch.Tensor], torch.Tensor]) -> Callable[[Any, Pass], torch.Tensor]:
    """A loss_sum whose `number`th result (from 0) is spoilt; one pass a step, the warm-up is call 0."""
    calls = iter(range(10**6))

    def spoilt(model: Any, batch: Pass) -> torch.Tensor:
        loss = loss_sum(model, batch)
        if not torch.is_grad_enabled():  # an evaluation
            return loss
        return spoil(model, loss) if next(calls) == number else loss

    return spoilt


def nan_loss(model: Any, loss: torch.Tensor) -> torch.Tensor:
    return loss * torch.nan


def nan_gradient(model: Any, loss: torch.Tensor) -> torch.Tensor:
    """The same loss, with a gradient that is not a number: the root of 0 has an infinite slope."""
    parameter = next(p for p in model.parameters() if p.requires_grad)
    return loss + torch.sqrt(parameter.sum() * 0)


@pytest.mark.parametrize(("spoil", "what"), [(nan_loss, "the loss"), (nan_gradient, "the gradient's norm")])
def test_a_number_that_is_not_finite_fails_with_step_and_lines(
    spoil: Any, what: str, undisturbed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, **VALUES)
    with monkeypatch.context() as patch:
        patch.setattr(passes, "loss_sum", at_call(6, spoil))
        with pytest.raises(TrainingError) as failure:
            train_here(run)
    lines = [run_line + 1 for run_line in steps.step_rows(12, 4, 5, run.config().seed)]
    assert f"step 6: {what} became nan (rows of lines {', '.join(map(str, lines))})" in str(failure.value)
    assert "Lower learning_rate (now 0.01)" in str(failure.value)
    assert (run.status().state, run.status().step, run.status().checkpoint_step) == (FAILED, 5, 4)
    assert_nothing_saved_is_spoilt(run)
    train_here(run)  # it did not come again: the run goes on from step 4
    assert losses(run) == losses(undisturbed) and adapter(run).keys() == adapter(undisturbed).keys()


def test_a_gradient_that_overflows_in_the_warm_up_spoils_nothing(
    undisturbed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As fp16 does while its loss scale settles."""
    run = make_run(tmp_path, **VALUES)
    monkeypatch.setattr(passes, "loss_sum", at_call(0, nan_gradient))
    train_here(run)
    assert losses(run) == losses(undisturbed)


def test_a_base_model_with_a_weight_that_is_not_finite(tmp_path: Path) -> None:
    folder = tmp_path / "poisoned"
    model = AutoModelForCausalLM.from_pretrained(model_folder())
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = torch.inf
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes((model_folder() / "tokenizer.json").read_bytes())
    (folder / "tokenizer_config.json").write_bytes((model_folder() / "tokenizer_config.json").read_bytes())
    run = make_run(tmp_path, base_model=str(folder))
    with pytest.raises(TrainingError, match=r"own evaluation loss is (nan|inf), before any training"):
        train_here(run)
    assert not list((run.path / "checkpoints").glob("*")) and not run.adapter.exists()


# -- hardware


@pytest.fixture
def gpu_without_cuda(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(devices, "gpus", lambda: (GPU,))
    monkeypatch.setattr(devices, "driver_versions", lambda: ("535.104", "12.2"))
    return monkeypatch


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (("2.13.0+cpu", None), r"H100, driver 535\.104 \(CUDA 12\.2\).*torch 2\.13\.0\+cpu is a build for CPUs only"),
        (
            ("2.13.0+cu130", "13.0"),
            r"torch 2\.13\.0\+cu130 needs CUDA 13\.0.*serves less \(H100, driver 535\.104 \(CUDA 12\.2\)",
        ),
        (("2.11.0+cu121", "12.1"), r"H100, driver 535\.104 \(CUDA 12\.2\)\) but the installed torch .* cannot use it"),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_named_with_both_versions(
    build: Any, words: str, gpu_without_cuda: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpu_without_cuda.setattr(devices, "torch_build", lambda: build)
    gpu_without_cuda.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("auto", "cuda"):
        with pytest.raises(DeviceError, match=words) as failure:
            train_here(make_run(tmp_path, device=device))
        assert "choose the device 'cpu'" in str(failure.value)


def test_beside_such_a_gpu_the_cpu_still_trains(gpu_without_cuda: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert train_here(make_run(tmp_path, max_steps=1)).status().state == FINISHED


def test_cuda_without_a_gpu_and_fp16_on_a_cpu_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(devices, "gpus", lambda: ())
    with pytest.raises(DeviceError, match="device is 'cuda' but no GPU is here; choose 'auto' or 'cpu'"):
        train_here(make_run(tmp_path, device="cuda"))
    with pytest.raises(DeviceError, match="compute_dtype is fp16, which CPUs train too coarsely"):
        train_here(make_run(tmp_path, compute_dtype="fp16"))


def test_without_a_c_compiler_it_trains_uncompiled_and_says_so(
    undisturbed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "c_compiler", lambda: None)
    run = train_here(make_run(tmp_path, **VALUES, compile="on"))
    started = said(run, events.Started)[0]
    assert not started.compiled and "there is no C compiler here (install gcc)" in started.compiled_reason
    assert losses(run) == losses(undisturbed)


def test_compiling_that_fails_goes_on_uncompiled(
    undisturbed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: Any, **values: Any) -> None:
        raise torch._dynamo.exc.TorchDynamoException("the compiler refuses\nand says why at length")

    monkeypatch.setattr(devices, "c_compiler", lambda: "/usr/bin/cc")
    monkeypatch.setattr(torch, "compile", lambda forward, **options: refused)
    run = train_here(make_run(tmp_path, **VALUES, compile="on"))
    assert notes(run) == ["compiling failed, training goes on uncompiled: the compiler refuses"]
    assert losses(run) == losses(undisturbed)


@pytest.mark.slow
@pytest.mark.skipif(devices.c_compiler() is None, reason="needs a C compiler")
@pytest.mark.filterwarnings("ignore")
def test_compiled_layers_learn_the_same(undisturbed: Run, tmp_path: Path) -> None:
    run = train_here(make_run(tmp_path, **VALUES, compile="on"))
    assert said(run, events.Started)[0].compiled and not notes(run)
    assert_same_within_float_error(run, undisturbed)


# -- data and model


def test_rows_that_are_all_cut_are_refused_with_the_length_they_need(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b" * (60 + i)} for i in range(4)]
    longest = len("<user\na<\n<assistant\n<\n".replace("<", "|")) + 63  # one token a byte, and one a mark
    run = make_run(tmp_path, train_rows=rows, max_seq_length=64)
    with pytest.raises(
        DatasetError, match=rf"every row is cut before its end \(max_seq_length is 64\).* to {longest} "
    ):
        train_here(run)


def test_rows_without_a_supervised_token_are_refused_or_left_out(tmp_path: Path) -> None:
    """A prompt as long as max_seq_length leaves nothing of its response."""
    long, short = {"prompt": "p" * 90, "completion": "c"}, {"prompt": "p", "completion": "c"}
    with pytest.raises(DatasetError, match=r"no training row has a token to learn.*max_seq_length is 64; lines 1, 2\)"):
        train_here(make_run(tmp_path, train_rows=[long, long], max_seq_length=64))
    with pytest.raises(DatasetError, match=r"no evaluation row has a token to learn.*lines 1\)"):
        train_here(make_run(tmp_path, eval_rows=[long], max_seq_length=64))
    rows = [short, long, short | {"prompt": "q"}]
    run = make_run(tmp_path, train_rows=rows, eval_rows=[long, short, short], max_seq_length=64, max_steps=1)
    train_here(run)
    started = said(run, events.Started)[0]
    assert (started.train_rows, started.rows_cut, started.rows_left_out) == (2, 1, (2,))
    assert (started.eval_rows, started.eval_rows_left_out) == (2, (1,))


def test_a_base_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is no folder here and no Hub id"):
        make_run(tmp_path, base_model=str(tmp_path / "nothing"))
    run = make_run(tmp_path)
    info = (run.path / "model.json").read_text().replace(str(model_folder()), str(tmp_path / "moved"))
    (run.path / "model.json").write_text(info)
    with pytest.raises(ModelError, match="moved is gone; put it back"):
        train_here(run)


def test_target_modules_that_do_not_exist_name_what_does(tmp_path: Path) -> None:
    words = (
        r"no linear layer c_attn, nonsense; name other layers of down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj"
    )
    with pytest.raises(ConfigError, match=words):
        train_here(make_run(tmp_path, target_modules="c_attn,q_proj,nonsense"))


@pytest.mark.parametrize(
    ("architecture", "preset", "expected"),
    [
        ("llama", "query-value", {"q_proj", "v_proj"}),
        ("llama", "attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("gpt2", "query-value", {"c_attn"}),
        ("gpt2", "attention", {"c_attn", "c_proj"}),
        ("gpt_neox", "query-value", {"query_key_value"}),
        ("bloom", "attention", {"query_key_value", "dense"}),
        ("opt", "query-value", {"q_proj", "v_proj"}),
        ("mpt", "query-value", {"Wqkv"}),
    ],
)
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_presets_name_the_layers_of_each_architecture(
    architecture: str, preset: str, expected: set[str], method: str
) -> None:
    config = TrainConfig(target_modules=preset, method=method)
    model = loading.load_base(model_folder(architecture), config, device=torch.device("cpu"), dtype="fp32")
    adapted = loading.add_adapter(model, config, base_name="tiny")
    found = {name.split(".lora_A")[0] for name, _ in adapted.named_parameters() if "lora_A" in name}
    assert {name.rsplit(".", 1)[-1] for name in found} == expected
    if preset == "attention":
        assert not any("mlp" in name for name in found)


def test_gpt2_trains_with_query_value(tmp_path: Path) -> None:
    """Its query, key and value are one layer, stored transposed."""
    values = {"base_model": str(model_folder("gpt2")), "target_modules": "query-value", "max_steps": 10}
    run = train_here(make_run(tmp_path, **values))
    assert eval_losses(run)[10] < eval_losses(run)[0]
    assert {name.split(".")[-3] for name in adapter(run)} == {"c_attn"}


def test_rows_longer_than_the_models_positions_are_refused_with_both_numbers(tmp_path: Path) -> None:
    rows = [{"prompt": "a" * 40, "completion": "b" * 60}, {"prompt": "c" * 20, "completion": "d" * 30}]
    folder = tmp_path / "short"
    shutil.copytree(model_folder("gpt2"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_positions": 64, "max_position_embeddings": 64}))
    run = make_run(tmp_path, train_rows=rows, base_model=str(folder), max_seq_length=512)
    with pytest.raises(
        DatasetError, match=r"line 1 has 1\d\d tokens, but short has positions for 64; set max_seq_length"
    ):
        train_here(run)


def test_rows_that_the_template_refuses_are_listed_at_once_or_left_out_if_asked(tmp_path: Path) -> None:
    folder = tmp_path / "strict"
    shutil.copytree(model_folder(), folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    strict = "{% if messages[0].content == 'no' %}{{ raise_exception('no is no') }}{% endif %}" + CHATML
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": strict}))
    rows = [*dataset(4), {"prompt": "no", "completion": "x"}, {"prompt": "no", "completion": "y"}]
    with pytest.raises(DatasetError) as failure:
        train_here(make_run(tmp_path, train_rows=rows, base_model=str(folder)))
    assert "2 rows cannot be written in the chat template" in str(failure.value)
    assert "line 5" in str(failure.value) and "line 6" in str(failure.value)
    run = train_here(make_run(tmp_path, train_rows=rows, base_model=str(folder), skip_bad_rows=True))
    assert said(run, events.Started)[0].rows_left_out == (5, 6)


def test_a_run_of_one_step_learns(tmp_path: Path) -> None:
    run = train_here(make_run(tmp_path, max_steps=1))
    assert said(run, events.Step)[0].learning_rate > 0
    assert eval_losses(run)[1] != eval_losses(run)[0]


def test_the_result_names_the_path_that_ran_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "loss_sum", memory_for(180, checkpointed=180, calls=[]))
    run = train_here(make_run(tmp_path, **VALUES))
    path = run.result()["run_info"]["path"]
    assert path["token_budget"] < said(run, events.Started)[0].token_budget
    assert path["checkpointed_layers"] == 0
