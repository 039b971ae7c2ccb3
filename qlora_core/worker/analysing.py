"""The analysis of a study: what its adapters have learnt, what quantising the base lost, how its models answer. Trains nothing."""

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel

from qlora_core import adapter_comparison, events, precision
from qlora_core.adapter_comparison import Update
from qlora_core.config import replace
from qlora_core.data.rows import Example
from qlora_core.data.stored import read_stored
from qlora_core.errors import LabError, RunError, TrainingError
from qlora_core.memory import PASS_TOKENS
from qlora_core.run_status import FINISHED
from qlora_core.runs import Run
from qlora_core.scores import scorer, wilson_interval
from qlora_core.studies import StudyStore
from qlora_core.study_results import ARM, StudyRun
from qlora_core.tokens import load_tokenizer, prompt_ids
from qlora_core.worker import behaviour, hardware, loading
from qlora_core.worker.evaluation import count_correct, evaluation_loss, generate_tokens
from qlora_core.worker.quantisation_error import quantisation_error
from qlora_core.worker.reading import read_rows
from qlora_core.worker.training import StopAsked, Training, run_guarded

BASE, FOUND = "base", "found.json"
# What a LoRA run ignores: its pair may differ in them.
OF_QLORA = ("method", "quant_type", "double_quant", "quantize_modules", "int8_modules")
LONGEST_PROMPT_TOKENS = 1024  # of rows that are answered: a longer one would make the batch of all slow


def analyse(run: Run, stop: Any) -> None:
    """Compare the runs of the study that analysis.json names. Raises LabError where a person can mend what is wrong."""
    run_guarded(StudyAnalysis(run, stop))


class StudyAnalysis(Training):
    """As a training: the same rows, base, device, memory messages and stopping, with comparisons in place of the steps. What each
    part has found is written before the next begins. One base is in memory at a time."""

    def run_to_end(self) -> None:
        self.asked = self.run.analysis()
        self.found: dict[str, Any] = {"updates": {}}
        if any(isinstance(event, events.Launched) and event.attempt > 1 for event in self.run.events()[0]):
            self.say(events.Resumed(from_step=0))  # runs may have ended since: it begins anew
        try:
            self.study = StudyStore(self.run.settings).get(self.asked["study_id"])
            self.finished = self.finished_runs()
            self.compare_weights()
            self.measure_quantisation()
            self.compare_behaviour()
        except StopAsked:
            self.say(events.Stopped(step=0))
        else:
            self.say(events.Finished(step=0, reason=f"compared {len(self.finished)} runs"))

    def finished_runs(self) -> list[StudyRun]:
        """Raises RunError where none has finished with an adapter."""
        results = self.study.results()
        usable = [run for run in results.runs if run.state == FINISHED and self.adapter_of(run).exists()]
        left_out = [run for run in results.runs if run not in usable]
        if left_out:
            named = ", ".join(f"{run.label} ({run.state})" for run in left_out)
            self.say(events.Note(text=f"not compared, as they have not finished: {named}"))
        if not usable:
            raise RunError(f"{self.study.study_id}: none of its runs has finished with an adapter; resume the study")
        return usable

    def adapter_of(self, run: StudyRun) -> Any:
        return self.run.settings.runs / run.run_id / "adapter" / "adapter_model.safetensors"

    def keep(self, **found: Any) -> None:
        self.found |= found
        partial = self.run.path / f"{FOUND}.partial"
        partial.write_text(json.dumps(self.found, ensure_ascii=False))
        os.replace(partial, self.run.path / FOUND)

    # -- weights

    def compare_weights(self) -> None:
        pairs = list(weight_pairs(self.finished))
        last_use = {run.run_id: place for place, (*both, _, _) in enumerate(pairs) for run in both}
        held: dict[str, Update | None] = {}
        refused, spectra, similarity = [], {}, []

        def update_of(run: StudyRun) -> Update | None:
            if run.run_id not in held:
                try:
                    held[run.run_id] = self.load_update(run)
                except LabError as error:
                    held[run.run_id] = None
                    refused.append({"run_id": run.run_id, "reason": str(error)})
                else:
                    spectra[run.run_id] = adapter_comparison.spectrum(held[run.run_id])
            return held[run.run_id]

        for place, (first, second, kind, label) in enumerate(pairs):
            self.check_stop()
            self.phase("comparing what the adapters have learnt", place, len(pairs))
            one, other = update_of(first), update_of(second)
            if one and other:
                found = adapter_comparison.compare(one, other).to_json()
                told = {"first": first.run_id, "second": second.run_id, "kind": kind, "label": label}
                similarity.append(told | found)
            for run_id in [run_id for run_id, use in last_use.items() if use <= place and held.get(run_id)]:
                held[run_id] = None  # 8B adapters of high rank would not all fit
        for run in self.finished:
            self.check_stop()
            if run.run_id not in held:
                update_of(run)
                held[run.run_id] = None
        self.keep(similarity=similarity, updates=spectra, refused=refused)

    def load_update(self, run: StudyRun) -> Update:
        if run.config.init_lora_weights == "loftq":
            raise RunError(
                "LoftQ begins with what 4 bits lost, which is in the adapter, so it is not what was learnt alone"
            )
        return adapter_comparison.load_update(self.adapter_of(run).parent)

    # -- the base

    def measure_quantisation(self) -> None:
        """For each way in which a run of the study held its base, once for each type of number."""
        measured: dict[tuple[Any, ...], dict[str, Any]] = {}
        for config in {
            precision.words(r.config): r.config for r in self.finished if r.config.method == "qlora"
        }.values():

            def report(done: int, total: int, told: str = precision.words(config)) -> None:
                self.check_stop()
                if done % 8 == 0:
                    self.phase(f"measuring what {told} loses of each matrix", done, total)

            for found in quantisation_error(
                self.base.folder, config, device=self.device, dtype=hardware.DTYPES[self.dtype], report=report
            ):
                measured.setdefault((found["layer"], found["module"], found["type"]), found)
        self.keep(quantisation=list(measured.values()))

    # -- answers

    def compare_behaviour(self) -> None:
        self.tokenizer = load_tokenizer(self.base.folder, self.config.template)
        self.phase("reading the dataset")
        self.rows = read_rows(self.run, self.tokenizer, check=self.check_stop)
        self.examples = self.answerable()
        seed = min(run.seed for run in self.finished if run.role == ARM)
        arms = [run for run in self.finished if run.role == ARM and run.seed == seed]
        self.sources: dict[str, dict[str, Any]] = {}
        self.answers: dict[str, list[list[int]]] = {}
        quantised: dict[str, list[StudyRun]] = {}
        for run in arms:
            if run.config.method == "qlora":
                quantised.setdefault(precision.words(run.config), []).append(run)
        for words, runs in quantised.items():
            with self.loaded(runs[0]) as model:
                self.measure_all(
                    model, runs, f"{BASE} {words.replace(', double quantisation', '')}", f"base in {words}"
                )
        lora = [run for run in arms if run.config.method == "lora"]
        with self.loaded(None) as model:
            self.measure_all(model, lora, BASE, "base in 16 bits")
            self.phase("comparing the answers")
            embedded = {
                source: behaviour.embeddings(
                    model, self.prompts, answers, device=self.device, check_stop=self.check_stop
                )
                for source, answers in self.answers.items()
            }
        self.keep(behaviour=self.compared(arms, quantised, embedded))

    def answerable(self) -> list[Example]:
        """Held-out rows with a response, whose prompt and answer the model has positions for."""
        room = (self.base.positions() or math.inf) - self.asked["answer_tokens"]
        known = {row.line for row in self.rows.evaluation}
        found, self.prompts = [], []
        for example in read_stored(self.run.path / "dataset" / "eval.jsonl"):
            if example.is_text or example.line not in known:
                continue
            prompt = prompt_ids(example, self.tokenizer)
            if len(prompt) <= min(room, LONGEST_PROMPT_TOKENS):
                found.append(example)
                self.prompts.append(prompt)
            if len(found) == self.asked["answered_rows"]:
                break
        return found

    @contextmanager
    def loaded(self, run: StudyRun | None) -> Iterator[Any]:
        """The base as the run held it, or in 16 bits; its memory is free again afterwards."""
        self.check_stop()
        config = run.config if run else replace(self.config, method="lora", init_lora_weights="default")
        self.phase(f"loading the base model in {precision.words(config) if run else '16 bits'}")
        self.model = loading.load_base(self.base.folder, config, device=self.device, dtype=self.dtype).eval()
        try:
            yield self.model
        finally:
            self.model = None
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def measure_all(self, model: Any, runs: Sequence[StudyRun], base: str, label: str) -> None:
        """The base by itself, then with the adapter of each run in turn."""
        self.measure_source(model, base, label)
        for run in runs:
            self.check_stop()
            self.phase(f"answering as {run.label or run.name}")
            adapted = PeftModel.from_pretrained(model, str(self.adapter_of(run).parent)).eval()
            try:
                self.measure_source(adapted, run.run_id, run.label or run.name)
            finally:
                adapted.unload()
        model.eval()

    def measure_source(self, model: Any, source: str, label: str) -> None:
        config = self.config
        with self.autocast():
            loss, _ = evaluation_loss(
                model,
                self.rows.evaluation,
                token_budget=config.token_budget or PASS_TOKENS[self.device.type == "cuda"][0],
                packed=False,
                device=self.device,
                between_passes=self.check_stop,
            )
            if not math.isfinite(loss):
                raise TrainingError(f"{label}: the evaluation loss is {loss}; look at that run's log")
            answers = self.answered(model, label)
        texts = [self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in answers]
        told = {"label": label, "loss": loss, "perplexity": math.exp(min(loss, 700)), "score": None}
        if config.score != "none" and texts:
            correct = count_correct(texts, self.examples, scorer(config.score, config.score_fields))
            interval = wilson_interval(correct, len(texts))
            told["score"] = {"name": config.score, "correct": correct, "total": len(texts), "interval_95": interval}
        self.sources[source] = told | {"texts": texts}
        self.answers[source] = answers

    def answered(self, model: Any, label: str) -> list[list[int]]:
        def report(answered: int, total: int) -> None:
            self.check_stop()
            self.phase(f"answering held-out rows, {label}", answered, total)

        if not self.examples:
            return []
        return generate_tokens(
            model,
            self.tokenizer,
            self.examples,
            max_new_tokens=self.asked["answer_tokens"],
            device=self.device,
            report=report,
        )

    def autocast(self) -> Any:
        if self.dtype == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, hardware.DTYPES[self.dtype])

    def compared(
        self, arms: Sequence[StudyRun], quantised: dict[str, list[StudyRun]], embedded: dict[str, torch.Tensor]
    ) -> dict[str, Any]:
        bases = [source for source in self.sources if source.startswith(BASE)]
        lora_qlora = [(one.run_id, other.run_id) for one, other, kind, _ in weight_pairs(arms) if kind == "lora-qlora"]
        pairs = [*lora_qlora, *((BASE, run.run_id) for run in arms), *((BASE, base) for base in bases if base != BASE)]
        return {
            "sources": {
                source: {name: value for name, value in told.items() if name != "texts"}
                for source, told in self.sources.items()
            },
            "pairs": [
                {"first": first, "second": second}
                | behaviour.agreement(self.answers[first], self.answers[second], embedded[first], embedded[second])
                for first, second in pairs
                if self.examples
            ],
            "rows": [
                {
                    "line": example.line,
                    "prompt": example.messages[0].content + (f"\n\n{example.input}" if example.input else ""),
                    "reference": example.reference,
                    "answers": {source: told["texts"][place] for source, told in self.sources.items()},
                }
                for place, example in enumerate(self.examples)
            ],
        }


def weight_pairs(runs: Sequence[StudyRun]) -> Iterator[tuple[StudyRun, StudyRun, str, str]]:
    """(first, second, kind, label): LoRA and QLoRA runs of equal other settings and seed; each run of the noise floor with the arm
    it repeats; neighbours in the grid of one method."""
    arms = [run for run in runs if run.role == ARM]
    common = {id(run): {k: v for k, v in run.varied.items() if k not in OF_QLORA} for run in arms}
    for qlora in arms:
        lora = next(
            (
                run
                for run in arms
                if run.config.method == "lora" and run.seed == qlora.seed and common[id(run)] == common[id(qlora)]
            ),
            None,
        )
        if qlora.config.method == "qlora" and lora:
            yield lora, qlora, "lora-qlora", qlora.label
    for run in runs:
        if run.role == ARM:
            continue
        for arm in arms:
            if arm.varied == run.varied:
                yield arm, run, run.role, run.label
                break
    seed = min((run.seed for run in arms), default=0)
    for method in ("lora", "qlora"):
        ladder = [run for run in arms if run.config.method == method and run.seed == seed]
        for first, second in zip(ladder, ladder[1:], strict=False):
            yield first, second, "other arm", f"{first.label} – {second.label}"
