"""A combination of adapters: load the base once, add the parts by weight, evaluate the sum, save it. Trains nothing."""

import math
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch.nn.functional import pad

from qlora_core import events
from qlora_core.combining import METHODS, adapter_weights
from qlora_core.errors import RunError, TrainingError
from qlora_core.memory import PASS_TOKENS
from qlora_core.runs import Run, RunStore
from qlora_core.storage import file_sha256
from qlora_core.tokens import load_tokenizer, template_name
from qlora_core.worker import hardware, loading, results
from qlora_core.worker.evaluation import evaluation_loss
from qlora_core.worker.reading import read_rows
from qlora_core.worker.training import StopAsked, Training, run_guarded

COMBINED = "default"  # the name under which PEFT saves at the folder's top, where every loader looks


def combine(run: Run, stop: Any) -> None:
    """Combine the adapters that combination.json names. Raises LabError where a person can mend what is wrong."""
    run_guarded(Combination(run, stop))


class Combination(Training):
    """As a training: the same rows, base, device, memory messages and files, with an addition in place of the steps."""

    def run_to_end(self) -> None:
        self.combination = self.run.combination()
        if any(isinstance(event, events.Launched) and event.attempt > 1 for event in self.run.events()[0]):
            self.say(events.Resumed(from_step=0))  # nothing of an earlier attempt holds: it begins anew
        try:
            self.tokenizer = load_tokenizer(self.base.folder, self.config.template)
            self.phase("reading the dataset")
            self.rows = read_rows(self.run, self.tokenizer, check=self.check_stop)
            for remark in self.run.dataset().remarks():
                self.say(events.Note(text=remark))
            self.load_parts()
            self.add_parts()
            self.evaluate()
            self.check_stop()
        except StopAsked:
            self.say(events.Stopped(step=0))
        else:
            self.finish_combined()

    def load_parts(self) -> None:
        parts = self.combination["parts"]
        runs = self.runs_of_parts()
        self.phase("loading the base model")
        self.meter.reset()
        model = loading.load_base(self.base.folder, self.config, device=self.device, dtype=self.dtype)
        self.load_peaks = self.meter.host(), self.meter.allocated()
        for place, run in enumerate(runs):
            self.check_stop()
            self.phase("loading the adapters", place, len(parts))
            if place == 0:
                model = PeftModel.from_pretrained(model, str(run.adapter), adapter_name="part0")
            else:
                model.load_adapter(str(run.adapter), f"part{place}")
        self.model = model.eval()

    def runs_of_parts(self) -> list[Run]:
        """Raises RunError where a part is no longer what it was when the combination was asked for."""
        store, problems, runs = RunStore(self.run.settings), [], []
        known = {run.run_id: run for run in store.list()}
        for part in self.combination["parts"]:
            run = known.get(part["run_id"])
            if run is None or not adapter_weights(run).exists():
                problems.append(f"{part['run_id']}: its adapter is gone; combine other runs")
            elif file_sha256(adapter_weights(run)) != part["adapter_sha256"]:
                problems.append(f"{run.run_id}: its adapter has changed since; combine the runs again")
            else:
                runs.append(run)
        if problems:
            raise RunError(*problems)
        return runs

    @torch.no_grad()
    def add_parts(self) -> None:
        """Leaves the model with the combination as its only adapter, in fp32."""
        self.check_stop()
        method, parts = self.combination["method"], self.combination["parts"]
        self.phase(f"combining {len(parts)} adapters by {method}")
        names = [f"part{place}" for place in range(len(parts))]
        # PEFT copies these from the first part: with use_rslora the combination would count its scale a second time, and
        # a start such as "orthogonal" refuses some ranks. The scales of the parts are in their layers already.
        first = self.model.peft_config[names[0]]
        first.use_rslora, first.init_lora_weights = False, True
        torch.manual_seed(self.config.seed)  # dare drops entries at random
        self.model.add_weighted_adapter(
            names,
            [part["weight"] for part in parts],
            COMBINED,
            combination_type="cat" if method == "svd" else method,
            density=self.combination["density"],
            svd_rank=self.config.rank,
            svd_full_matrices=False,
        )
        self.model.set_adapter(COMBINED, inference_mode=True)
        for name in names:
            self.model.delete_adapter(name)
        self.give_rank(self.config.rank)

    def give_rank(self, rank: int) -> None:
        for layer in self.model.modules():
            if isinstance(layer, LoraLayer) and COMBINED in layer.lora_A:
                a, b = layer.lora_A[COMBINED].weight, layer.lora_B[COMBINED].weight
                a.data, b.data = of_rank(a.data.float(), b.data.float(), rank)
        adapter = self.model.peft_config[COMBINED]
        adapter.r, adapter.lora_alpha, adapter.base_model_name_or_path = rank, rank, self.base.name

    def evaluate(self) -> None:
        self.phase(f"evaluating on {len(self.rows.evaluation)} rows")
        begin = hardware.clock(self.device)
        with torch.autocast(self.device.type, hardware.DTYPES[self.dtype], enabled=self.dtype != "fp32"):
            loss, tokens = evaluation_loss(
                self.model,
                self.rows.evaluation,
                token_budget=self.config.token_budget or PASS_TOKENS[self.device.type == "cuda"][0],
                packed=False,
                device=self.device,
                between_passes=self.check_stop,
            )
        if not math.isfinite(loss):
            raise TrainingError(
                f"the combination's evaluation loss is {loss}; choose smaller weights or another method"
            )
        self.loss = loss
        seconds = hardware.clock(self.device) - begin
        self.say(events.Evaluation(step=0, loss=loss, tokens=tokens, seconds=seconds))

    def finish_combined(self) -> None:
        self.phase("saving the adapter")
        results.write_adapter(self.run, self.model, self.tokenizer)
        self.say(events.Note(text=told(self.combination)))
        method, parts = self.combination["method"], self.combination["parts"]
        ending = events.Finished(step=0, reason=f"combined from {len(parts)} adapters by {method}")
        results.write_run_result(
            self.run,
            ending,
            how={
                "template": template_name(self.tokenizer, self.config.template),
                "compute_dtype": self.dtype,
                "path": {"packed": "padded: one evaluation, no training", "compiled": "eager: no training"},
                "combination": self.combination | {"help": METHODS[method].help},
            },
            found=self.found(),
            device=self.device,
            attempt_started=self.attempt_started,
        )
        self.say(ending)

    def found(self) -> dict[str, Any]:
        """train_info of a run without a step: no row was trained on here."""
        return {
            "steps": 0,
            "total_steps": 0,
            "train_rows": 0,
            "eval_rows": len(self.rows.evaluation),
            "rows_cut": 0,
            "rows_left_out": [],
            "eval_rows_left_out": list(self.rows.eval_left_out),
            "load_peak_host_bytes": self.load_peaks[0],
            "load_peak_allocated_bytes": self.load_peaks[1],
            "peak_allocated_bytes": self.meter.allocated(),
            "peak_reserved_bytes": self.meter.reserved(),
            "peak_host_bytes": self.meter.host(),
            "trainable_parameters": sum(tensor.numel() for tensor in loading.adapter_tensors(self.model).values()),
            "adapter_step": 0,
        }


def of_rank(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A [rank, in] and B [out, rank] whose product is the nearest to b·a that the rank allows (Eckart-Young).

    From the small factors of two QR decompositions: PEFT decomposes the whole in x out matrix, for minutes a layer.
    """
    if len(a) > rank:
        (q_b, r_b), (q_a, r_a) = torch.linalg.qr(b), torch.linalg.qr(a.T)
        u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
        a, b = (v @ q_a.T)[:rank], (q_b @ (u * s))[:, :rank]
    # A layer narrower than the rank has fewer directions; every layer gets the same shape.
    missing = rank - len(a)
    return pad(a, (0, 0, 0, missing)).contiguous(), pad(b, (0, missing)).contiguous()


def told(combination: dict[str, Any]) -> str:
    """What was added and how good each part was alone, where it was measured on the same rows."""
    parts = []
    for part in combination["parts"]:
        known = part["eval_loss"] is not None and part["same_eval_rows"]
        parts.append(f"{part['weight']:g} x {part['name']}" + (f" (alone {part['eval_loss']:.4f})" if known else ""))
    return " + ".join(parts)
