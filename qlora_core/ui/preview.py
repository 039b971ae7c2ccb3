"""What the model will see: uploads kept, rows as coloured tokens, token lengths. Reads rows as a stream, keeps none."""

import contextlib
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from qlora_core import architecture, models
from qlora_core.data.rows import Example, read_rows
from qlora_core.data.sample import SAMPLED_ROWS, RowFacts, sample
from qlora_core.errors import DatasetError, ModelError
from qlora_core.settings import Settings
from qlora_core.tokens import RenderedExample, load_tokenizer, render
from qlora_core.ui.words import counted, esc

SHOWN_TOKENS = 1500
TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "*.jinja"]


def keep_upload(path: Path, settings: Settings) -> Path:
    """Copy an upload out of gradio's cache to `<home>/uploads/<content hash>/<safe name>`; returns the copy."""
    digest = hashlib.sha256()
    folder = settings.home / "uploads"
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{os.getpid()}-{secrets.token_hex(4)}.partial"
    try:
        with path.open("rb") as source, partial.open("wb") as copy:
            while block := source.read(1 << 20):
                digest.update(block)
                copy.write(block)
        kept = folder / digest.hexdigest()[:16] / safe_name(path.name)
        kept.parent.mkdir(exist_ok=True)
        shutil.move(partial, kept)
        return kept
    finally:
        partial.unlink(missing_ok=True)


def kept_upload(name: str, settings: Settings) -> Path | None:
    """The copy that a browser names as `<content hash>/<name>`, or None: it is not there, or not an upload at all."""
    if not re.fullmatch(r"[0-9a-f]{16}/[^/\0]{1,200}", str(name)):
        return None
    path = settings.home / "uploads" / str(name)
    return path if path.is_file() else None


def warm_up(settings: Settings) -> None:
    """Import and load what the first preview needs; seconds that nobody then waits for."""
    with contextlib.suppress(ModelError):
        load_tokenizer(models.resolve(models.BUNDLED, settings).folder)
        architecture.read(models.BUNDLED, settings)


def tokenizer_folder(base_model: str, settings: Settings) -> Path:
    """Where the tokenizer lies. Of a model on the Hub only its tokenizer is fetched. Raises ModelError."""
    return architecture.files_of(base_model or "", TOKENIZER_FILES, settings, what="tokenizer")


def safe_name(name: str) -> str:
    """A file name that stays in its folder and that every file system takes."""
    return re.sub(r"[^\w.-]+", "-", Path(name).name, flags=re.ASCII).strip(".-")[-100:] or "dataset.jsonl"


def examples(path: Path, settings: Settings) -> Iterator[Example]:
    """The usable rows in order."""
    return (row for row in read_rows(path, max_row_bytes=settings.max_row_bytes) if isinstance(row, Example))


def lengths(path: Path, base_model: str, settings: Settings) -> RowFacts:
    """Token lengths and more of the first SAMPLED_ROWS usable rows. Raises DatasetError, ModelError."""
    folder = tokenizer_folder(base_model, settings)
    return _lengths(path, path.stat().st_mtime_ns, folder, settings)


@lru_cache(maxsize=16)
def _lengths(path: Path, _changed: int, folder: Path, settings: Settings) -> RowFacts:
    return sample(examples(path, settings), load_tokenizer(folder))


def shared_rows(path: Path, eval_path: Path, settings: Settings) -> tuple[int, int]:
    """(evaluation rows, how many of them are training rows too), over both whole files. Raises DatasetError."""
    return _shared_rows(path, eval_path, (path.stat().st_mtime_ns, eval_path.stat().st_mtime_ns), settings)


@lru_cache(maxsize=16)
def _shared_rows(path: Path, eval_path: Path, _changed: tuple[int, int], settings: Settings) -> tuple[int, int]:
    evaluation = [example.digest()[:8] for example in examples(eval_path, settings)]
    asked = set(evaluation)
    trained = {digest for example in examples(path, settings) if (digest := example.digest()[:8]) in asked}
    return len(evaluation), sum(digest in trained for digest in evaluation)


def row_html(path: Path, number: int, *, base_model: str, max_seq_length: int, settings: Settings) -> str:
    """Row `number` (from 1) as coloured tokens. Raises DatasetError, ModelError."""
    tokenizer = load_tokenizer(tokenizer_folder(base_model, settings))
    example = next(islice(examples(path, settings), number - 1, None), None)
    if example is None:
        raise DatasetError(f"{path.name}: has no usable row {number}")
    rendered = render(example, tokenizer, max_seq_length=max_seq_length)
    return tokens_html(rendered, set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder))


def tokens_html(rendered: RenderedExample, special: set[int]) -> str:
    """Escaped spans, one a token; a character that several tokens share is shown once, with its first."""
    pieces, position = [], 0
    for i, (start, end) in enumerate(rendered.spans[:SHOWN_TOKENS]):
        if start > position:
            pieces.append(f"<span>{_visible(rendered.text[position:start])}</span>")
        classes = ["on" if rendered.supervised[i] and i else "off"]
        classes += ["special"] if rendered.token_ids[i] in special else []
        classes += ["cut"] if i >= rendered.cut_at else []
        text = rendered.text[max(start, position) : end]
        if text:
            pieces.append(f'<span class="{" ".join(classes)}">{_visible(text)}</span>')
        position = max(position, end)
    more = len(rendered.token_ids) - SHOWN_TOKENS
    if more > 0:
        pieces.append(f"<i>… and {counted(more, 'token')} more</i>")
    return f'{_caption(rendered)}<div class="lab-tokens" tabindex="0">{"".join(pieces)}</div>'


def _visible(text: str) -> str:
    return esc(text).replace("\n", '<i class="newline">↵</i>\n')


def _caption(rendered: RenderedExample) -> str:
    parts = [counted(len(rendered.token_ids), "token"), f"{rendered.supervised_tokens:,} trained on"]
    if rendered.is_cut:
        parts.append(f"{len(rendered.token_ids) - rendered.cut_at:,} cut off")
    warning = ""
    if not rendered.supervised_tokens:
        warning = "Nothing of this row is trained on; raise max_seq_length or shorten the row."
    elif not rendered.end_supervised:
        warning = "The end of the response is not trained on, so the model does not learn to stop here."
    alarm = f'<span class="lab-warn">{esc(warning)}</span>' if warning else ""
    legend = '<span class="lab-legend"><span class="off">not trained on</span><span class="on">trained on</span></span>'
    return f'<div class="lab-caption"><span>{esc(" · ".join(parts))}</span>{legend}{alarm}</div>'


def lengths_sentence(found: RowFacts, *, rows: int, max_seq_length: int) -> str:
    """ "4 rows (1.7 %) would be cut", and what else a person should know before Start."""
    if not found.tokens:
        return ""
    sampled = f"Of the first {SAMPLED_ROWS:,} rows, " if rows > SAMPLED_ROWS else ""
    cut, bare = found.cut(max_seq_length), found.without_response(max_seq_length)
    text = (
        f"{counted(cut, 'row')} ({cut / len(found.tokens):.1%}) would be cut at {max_seq_length:,} tokens"
        if cut
        else f"no row is longer than {max_seq_length:,} tokens"
    )
    text = sampled + text if sampled else text[0].upper() + text[1:]
    return f"{text}; {counted(bare, 'row')} would have nothing left to train on." if bare else f"{text}."


def report_facts(report: Any) -> list[tuple[str, str]]:
    """Named figures of a DatasetReport."""
    return [
        ("usable rows", f"{report.rows:,}"),
        ("form", report.form or "unknown"),
        ("problems", f"{len(report.problems):,}"),
        ("duplicates", f"{len(report.duplicates):,}"),
    ]
