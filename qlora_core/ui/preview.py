"""What the model will see: rows as coloured tokens, token lengths, what is cut and what packing saves. Keeps no row."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from qlora_core import architecture, models, templates
from qlora_core.data.inspected import Inspected
from qlora_core.data.rows import Example, counted
from qlora_core.data.sample import SAMPLED_ROWS, RowFacts, sample
from qlora_core.errors import LabError, ModelError
from qlora_core.settings import Settings
from qlora_core.template_trial import check_trial
from qlora_core.tokens import ALL_RESPONSES, RenderedExample, load_tokenizer, render
from qlora_core.ui.chosen import Chosen, rows_of
from qlora_core.ui.words import esc

SHOWN_TOKENS = 1500


@dataclass(frozen=True)
class How:
    """What decides which tokens a row becomes."""

    base_model: str
    template: str = templates.MODEL
    loss_on: str = ALL_RESPONSES


def warm_up(settings: Settings) -> None:
    """Import and load what the first preview needs; seconds that nobody then waits for."""
    with contextlib.suppress(ModelError):
        load_tokenizer(models.resolve(models.BUNDLED, settings).folder)
        architecture.read(models.BUNDLED, settings)


def tokenizer_of(how: How, settings: Settings, rows: Inspected | None = None) -> Any:
    """Of a model on the Hub only its tokenizer is fetched; a typed template is first tried on the rows.

    Raises ModelError, ConfigError.
    """
    folder = architecture.tokenizer_folder(how.base_model or "", settings)
    tokenizer = load_tokenizer(folder, how.template or templates.MODEL)
    if rows is not None and how.template:
        check_trial(how.template, folder, rows)
    return tokenizer


def template_to_edit(base_model: str, settings: Settings) -> str:
    """The model's own template, to begin one's own with."""
    try:
        return tokenizer_of(How(base_model), settings).chat_template
    except LabError:
        return templates.ALPACA


def examples(rows: Inspected) -> Iterator[Example]:
    return (rows.row(number) for number in range(1, len(rows) + 1))


def lengths(chosen: Chosen, how: How, settings: Settings) -> RowFacts:
    """Token lengths and more of the first SAMPLED_ROWS usable rows. Raises DatasetError, ModelError, ConfigError."""
    rows = rows_of(chosen, settings)
    tokenizer_of(how, settings, rows)
    return _lengths(rows, how, settings)


@lru_cache(maxsize=16)
def _lengths(rows: Inspected, how: How, settings: Settings) -> RowFacts:
    return sample(examples(rows), tokenizer_of(how, settings), loss_on=how.loss_on)


def shared_rows(chosen: Chosen, eval_path: Path, settings: Settings) -> tuple[int, int]:
    """(evaluation rows, how many of them are training rows too), over both whole files. Raises DatasetError."""
    rows, evaluation = rows_of(chosen, settings), rows_of(Chosen(str(eval_path), columns=chosen.columns), settings)
    return len(evaluation), int(np.isin(evaluation.digests, rows.digests).sum())


def row_html(chosen: Chosen, number: int, how: How, *, max_seq_length: int, settings: Settings) -> str:
    """Row `number` (from 1) as coloured tokens. Raises DatasetError, ModelError, ConfigError."""
    rows = rows_of(chosen, settings)
    tokenizer = tokenizer_of(how, settings, rows)
    example = rows.row(number)
    rendered = render(example, tokenizer, loss_on=how.loss_on)
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return tokens_html(rendered, special, max_seq_length)


def tokens_html(rendered: RenderedExample, special: set[int], max_seq_length: int) -> str:
    """Escaped spans, one a token; a character that several tokens share is shown once, with its first. Of a long row its
    beginning and the place where it is cut."""
    pieces, position = [], 0
    for i, (start, end) in enumerate(rendered.spans[:SHOWN_TOKENS].tolist()):
        if start > position:
            pieces.append(f"<span>{_visible(rendered.text[position:start])}</span>")
        if i == max_seq_length:
            pieces.append('<b class="cut-line">cut here</b>')
        classes = ["on" if rendered.supervised[i] and i else "off"]
        classes += ["special"] if int(rendered.token_ids[i]) in special else []
        classes += ["cut"] if i >= max_seq_length else []
        text = rendered.text[max(start, position) : end]
        if text:
            pieces.append(f'<span class="{" ".join(classes)}">{_visible(text)}</span>')
        position = max(position, end)
    more = len(rendered.token_ids) - SHOWN_TOKENS
    if more > 0:
        pieces.append(f"<i>… and {counted(more, 'token')} more</i>")
    return f'{_caption(rendered, max_seq_length)}<div class="lab-tokens" tabindex="0">{"".join(pieces)}</div>'


def _visible(text: str) -> str:
    return esc(text).replace("\n", '<i class="newline">↵</i>\n')


def _caption(rendered: RenderedExample, max_seq_length: int) -> str:
    tokens, learnt = len(rendered.token_ids), rendered.supervised_tokens(max_seq_length)
    parts = [counted(tokens, "token"), f"{learnt:,} trained on"]
    if tokens > max_seq_length:
        parts.append(f"{tokens - max_seq_length:,} cut off")
    warning = ""
    if not learnt:
        warning = "Nothing of this row is trained on; raise max_seq_length or shorten the row."
    elif not rendered.end_supervised(max_seq_length):
        warning = "The end of the response is not trained on, so the model does not learn to stop here."
    alarm = f'<span class="lab-warn">{esc(warning)}</span>' if warning else ""
    legend = '<span class="lab-legend"><span class="off">not trained on</span><span class="on">trained on</span></span>'
    return f'<div class="lab-caption"><span>{esc(" · ".join(parts))}</span>{legend}{alarm}</div>'


def lengths_sentence(found: RowFacts, *, rows: int, max_seq_length: int, rows_per_step: int = 8, seed: int = 42) -> str:
    """ "4 rows (1.7 %) would be cut", what packing saves, and what else a person should know before Start."""
    if not found.tokens:
        return ""
    sampled = f"Of the first {SAMPLED_ROWS:,} rows, " if rows > SAMPLED_ROWS else ""
    cut, bare = found.cut(max_seq_length), found.without_response(max_seq_length)
    lost = found.cut_tokens(max_seq_length) / sum(found.tokens)
    text = (
        f"{counted(cut, 'row')} ({cut / len(found.tokens):.1%}) would be cut at {max_seq_length:,} tokens, which loses "
        f"{lost:.1%} of all tokens"
        if cut
        else f"no row is longer than {max_seq_length:,} tokens"
    )
    text = sampled + text if sampled else text[0].upper() + text[1:]
    text += f"; {counted(bare, 'row')} would have nothing left to train on." if bare else "."
    if rows_per_step > 1 and len(found.tokens) > 1:
        saved = found.padding_share(max_seq_length, rows_per_step, seed)
        text += (
            f" Packing spares {saved:.0%} of each step’s tokens, which would be padding in batches of {rows_per_step}."
        )
    return text
