"""How the models of a study answer held-out rows: each base loaded once, its adapters put on it in turn, one base at a time."""

import gc
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from qlora_core import events
from qlora_core.config import replace
from qlora_core.data.rows import Example
from qlora_core.data.stored import read_stored
from qlora_core.errors import TrainingError
from qlora_core.memory import PASS_TOKENS
from qlora_core.study_results import StudyRun
from qlora_core.tokens import load_tokenizer, prompt_ids
from qlora_core.worker import behaviour, hardware, loading
from qlora_core.worker.evaluation import evaluation_loss, generate_tokens
from qlora_core.worker.reading import read_rows
from qlora_core.worker.study_pairs import (
    IN_16_BITS,
    How,
    how_held,
    method_pairs,
    names_of_bases,
    scored,
    scored_base,
)
from qlora_core.worker.training import Training

BASE = "base"
LONGEST_PROMPT_TOKENS = 1024  # of rows that are answered: a longer one would make the batch of all slow


class Answers:
    """What every model of a study answers. `analysis` says phases, looks for a stop, and knows base, rows and device."""

    def __init__(self, analysis: Training, arms: Sequence[StudyRun], adapter_of: Callable[[StudyRun], Path]) -> None:
        self.analysis, self.arms, self.adapter_of = analysis, arms, adapter_of
        self.config, self.device, self.asked = analysis.config, analysis.device, analysis.run.analysis()
        self.sources: dict[str, dict[str, Any]] = {}
        self.tokens: dict[str, list[list[int]]] = {}
        self.tokenizer = load_tokenizer(analysis.base.folder, self.config.template)
        analysis.phase("reading the dataset")
        self.rows = read_rows(analysis.run, self.tokenizer, check=analysis.check_stop)
        self.examples, self.prompts = self._answerable()

    def _answerable(self) -> tuple[list[Example], list[list[int]]]:
        """Held-out rows with a response, whose prompt and answer the model has positions for; and their prompts."""
        room = (self.analysis.base.positions() or math.inf) - self.asked["answer_tokens"]
        known = {row.line for row in self.rows.evaluation}
        found, prompts = [], []
        for example in read_stored(self.analysis.run.path / "dataset" / "eval.jsonl"):
            if len(found) == self.asked["answered_rows"]:
                break
            if example.is_text or example.line not in known:
                continue
            prompt = prompt_ids(example, self.tokenizer)
            if len(prompt) <= min(room, LONGEST_PROMPT_TOKENS):
                found.append(example)
                prompts.append(prompt)
        return found, prompts

    def compared(self) -> dict[str, Any]:
        """`behaviour` of found.json; see study_results.Analysis."""
        held: dict[How, list[StudyRun]] = {}
        for run in self.arms:
            held.setdefault(how_held(run), []).append(run)
        in_16_bits = IN_16_BITS, self.analysis.dtype  # the base that embeds all answers, so it comes last
        of_16_bits = held.pop(in_16_bits, [])
        names = names_of_bases([*held, in_16_bits], self.analysis.dtype)
        for how, runs in held.items():
            self._on_base(how, runs, names[how])
        embedded = self._embedded_in_16_bits(in_16_bits, of_16_bits, held)
        pairs = [(lora.run_id, qlora.run_id) for lora, qlora, _, _ in method_pairs(self.arms)]
        untuned, *others = [name for name in (BASE, *(names[how] for how in held)) if name in self.sources]
        pairs += [(untuned, source) for source in (*(run.run_id for run in self.arms), *others)]
        return {
            "sources": self.sources,
            "pairs": [
                {"first": first, "second": second}
                | behaviour.agreement(self.tokens[first], self.tokens[second], embedded[first], embedded[second])
                for first, second in pairs
                if self.examples
            ],
            "rows": [self._row(place, example) for place, example in enumerate(self.examples)],
        }

    def _row(self, place: int, example: Example) -> dict[str, Any]:
        texts = {
            source: self.tokenizer.decode(answers[place], skip_special_tokens=True)
            for source, answers in self.tokens.items()
        }
        return {"line": example.line, "prompt": example.asked, "reference": example.reference, "answers": texts}

    def _embedded_in_16_bits(
        self, how: How, runs: Sequence[StudyRun], others: dict[How, list[StudyRun]]
    ) -> dict[str, torch.Tensor]:
        """Where a GPU has no room for the base in 16 bits, and so no run that needed it, one of the others embeds the answers."""
        try:
            return self._on_base(how, runs, BASE, embed=True)
        except torch.OutOfMemoryError:
            if runs or not others:
                raise
        self.sources.pop(BASE, None)
        self.tokens.pop(BASE, None)
        how, (run, *_) = next(iter(others.items()))
        text = "the base in 16 bits does not fit this device: answers are compared without it, and their embeddings are of the base"
        self.analysis.say(events.Note(text=f"{text} in {how[0]}"))
        return self._on_base(how, [run], None, embed=True)

    def _on_base(
        self, how: How, runs: Sequence[StudyRun], name: str | None, *, embed: bool = False
    ) -> dict[str, torch.Tensor]:
        """Load the base; under its `name`, if any, it answers by itself and then with the adapter of each run; and it embeds all
        answers so far where asked. Nothing of it is left in memory afterwards: the next one is loaded into its place."""
        words, dtype = how
        self.analysis.check_stop()
        self.analysis.phase(f"loading the base model in {words}")
        config = runs[0].config if runs else replace(self.config, method="lora", init_lora_weights="default")
        model = loading.load_base(self.analysis.base.folder, config, device=self.device, dtype=dtype).eval()
        try:
            if name is not None:
                self._measure(model, name, f"base in {words}", dtype, scored_base(runs))
                for run in runs:
                    self._measure_run(model, run, dtype)
            return self._embedded(model) if embed else {}
        finally:
            del model
            gc.collect()  # modules and hooks refer to each other
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _measure_run(self, model: Any, run: StudyRun, dtype: str) -> None:
        self.analysis.check_stop()
        label = run.label or run.name
        adapted = PeftModel.from_pretrained(model, str(self.adapter_of(run).parent)).eval()
        try:
            self._measure(adapted, run.run_id, label, dtype, scored(run))
        finally:
            adapted.unload()

    def _measure(self, model: Any, source: str, label: str, dtype: str, score: dict[str, Any] | None) -> None:
        """Evaluation loss and answers. `score`: as its run has counted it, on more rows and longer answers than are compared."""
        analysis, on_gpu = self.analysis, self.device.type == "cuda"
        analysis.phase(f"evaluating {label}")
        with nullcontext() if dtype == "fp32" else torch.autocast(self.device.type, hardware.DTYPES[dtype]):
            loss, _ = evaluation_loss(
                model,
                self.rows.evaluation,
                token_budget=self.config.token_budget or PASS_TOKENS[on_gpu][0],
                packed=False,
                device=self.device,
                between_passes=analysis.check_stop,
            )
            if not math.isfinite(loss):
                raise TrainingError(f"{label}: the evaluation loss is {loss}; look at that run's log")
            self.tokens[source] = self._answered(model, label)
        perplexity = math.exp(min(loss, 700))  # e^710 is no number any more
        self.sources[source] = {"label": label, "loss": loss, "perplexity": perplexity, "score": score}

    def _answered(self, model: Any, label: str) -> list[list[int]]:
        def report(answered: int, total: int) -> None:
            self.analysis.check_stop()
            self.analysis.phase(f"answering held-out rows, {label}", answered, total)

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

    def _embedded(self, model: Any) -> dict[str, torch.Tensor]:
        self.analysis.phase("comparing the answers")
        return {
            source: behaviour.embeddings(
                model, self.prompts, answers, device=self.device, check_stop=self.analysis.check_stop
            )
            for source, answers in self.tokens.items()
        }
