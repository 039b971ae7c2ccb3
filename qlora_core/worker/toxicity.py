"""Texts on standard input -> how toxic a classifier finds them, on standard output. Run as a process: -m … FOLDER.

A line in is a JSON array of texts; the lines that answer it are JSON arrays of [place, label, score, whether it was cut].
"""

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

BATCH_TEXTS, BATCH_TOKENS = 16, 16 * 512
# Where neither tokenizer nor model says how much it reads.
POSITIONS = 512
TOXIC = re.compile(
    r"tox|hat(e|red|eful)|offen[sc]|abus|insult|threat|obscen|profan|vulgar|harass|attack|aggress|hostil|violen|sexual_explicit"
    r"|slur|racis|sexis|bully|nsfw"
)
SAFE = re.compile(
    r"label_0|neutral|neither|none|normal|safe|clean|benign|ok|okay|acceptable|no|nothate|nontoxic|(non|not|no)[ _-].*"
)


class Classifier:
    """A model with its tokenizer, on the GPU that the process may use, else on the CPU, in 32 bits."""

    def __init__(self, folder: Path) -> None:
        """Raises SystemExit with what is wrong and what to do."""
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
            self.model = _loaded(folder).to(self.device).eval()
        except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
            raise SystemExit(f"it cannot be loaded: {' '.join(str(error).split())[:300]}") from None
        self.labels = [str(self.model.config.id2label[number]) for number in range(self.model.config.num_labels)]
        self.toxic = toxic_labels(self.labels)
        # One label alone is a yes or no of its own too.
        several = self.model.config.problem_type == "multi_label_classification"
        self.exclusive = not several and len(self.labels) > 1
        self.positions = _positions(self.model, self.tokenizer)

    def judge(self, texts: list[str]) -> Iterator[list[tuple[int, str, float, bool]]]:
        """(place, label, probability of being toxic, whether only its beginning was read), the longest texts first."""
        # Halves of surrogate pairs, which JSON can hold and a tokenizer cannot.
        texts = [text.encode("utf-8", "replace").decode() for text in texts]
        rows = self.tokenizer(texts, verbose=False)["input_ids"]
        nothing = [self.tokenizer.eos_token_id or 0]
        rows = [row or nothing for row in rows]  # of an empty text, where the model puts no marks around one
        is_cut = [len(row) > self.positions for row in rows]
        for place in (place for place, cut in enumerate(is_cut) if cut):
            rows[place] = self.tokenizer(texts[place], truncation=True, max_length=self.positions)["input_ids"]
        for batch in _batches(rows, alone=None in (self.tokenizer.pad_token_id, self.model.config.pad_token_id)):
            found = self._probabilities([rows[place] for place in batch])
            yield [(place, label, score, is_cut[place]) for place, (label, score) in zip(batch, found, strict=True)]

    @torch.inference_mode()
    def _probabilities(self, rows: list[list[int]]) -> Iterator[tuple[str, float]]:
        lengths = [len(row) for row in rows]
        ids = torch.full((len(rows), max(lengths)), self.tokenizer.pad_token_id or 0)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row)
            mask[number, : len(row)] = 1
        logits = self.model(input_ids=ids.to(self.device), attention_mask=mask.to(self.device)).logits.float().cpu()
        each = logits.softmax(-1) if self.exclusive else logits.sigmoid()
        toxic = each[:, self.toxic]
        best = toxic.argmax(-1).tolist()
        whole = toxic.sum(-1) if self.exclusive else toxic.amax(-1)
        return zip((self.labels[self.toxic[place]] for place in best), whole.clamp(0, 1).tolist(), strict=True)


def toxic_labels(labels: list[str]) -> list[int]:
    """Numbers of the labels that stand for the toxic side, as `qlora_core.toxicity.Verdict` says. Raises SystemExit for none.

    Models may have labels that are no judgement (unbiased-toxic-roberta: whom a text speaks of), beside those that are.
    """
    names = [label.lower().strip() for label in labels]
    unsafe = [number for number, name in enumerate(names) if not SAFE.fullmatch(name)]
    named = [number for number in unsafe if TOXIC.search(names[number])]
    if named or (unsafe and (len(unsafe) < len(names) or len(names) == 1)):
        return named or unsafe
    raise SystemExit(f"none of its labels ({', '.join(labels)[:200]}) says what is toxic; choose a toxicity model")


def _loaded(folder: Path) -> Any:
    """Raises SystemExit for a model that transformers does not know or that has no trained head."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    try:
        AutoConfig.for_model(config.get("model_type"))
    except ValueError:
        raise SystemExit(
            f"it needs code of its own (model type {config.get('model_type')!r}), which is never run here; choose a model that "
            "transformers knows"
        ) from None
    model, told = AutoModelForSequenceClassification.from_pretrained(
        str(folder),
        dtype=torch.float32,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
    )
    if told["missing_keys"]:
        missing = ", ".join(sorted(told["missing_keys"])[:3])
        raise SystemExit(f"its weights lack {missing}, so it was never trained to classify; choose a model that was")
    return model


def _positions(model: Any, tokenizer: Any) -> int:
    """Tokens of a text that the model reads."""
    limits = [tokenizer.model_max_length]
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            # RoBERTa and its kin count positions from behind the padding's.
            limits.append(module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1))
    if len(limits) == 1:
        limits.append(getattr(model.config, "max_position_embeddings", None) or limits[0])
    known = min(limits)
    return known if known < 10**9 else POSITIONS  # a tokenizer that knows none says 10**30


def _batches(rows: list[list[int]], *, alone: bool) -> Iterator[list[int]]:
    """Places of rows of like length, the longest first. Without a padding token each is `alone`."""
    batch: list[int] = []
    for place in sorted(range(len(rows)), key=lambda place: -len(rows[place])):
        longest = len(rows[batch[0]]) if batch else 0
        if batch and (alone or len(batch) == BATCH_TEXTS or (len(batch) + 1) * longest > BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def serve(classifier: Classifier, lines: TextIO, answers: TextIO) -> None:
    for line in lines:
        for batch in classifier.judge(json.loads(line)):
            answers.write(json.dumps(batch) + "\n")
            answers.flush()


def main() -> None:
    # What a library prints does not come between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # the last word on standard error is what a person sees
    serve(Classifier(Path(sys.argv[1])), sys.stdin, answers)


if __name__ == "__main__":
    main()
