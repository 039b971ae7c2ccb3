"""The queue as a list: which runs wait, in order, with a button each for earlier, later and out. Keeps nothing."""

from collections.abc import Sequence

from qlora_core import queue
from qlora_core.errors import LabError, RunError
from qlora_core.run_status import QUEUED, RUNNING, RunStatus
from qlora_core.runs import RunStore
from qlora_core.settings import Settings
from qlora_core.ui.words import esc, method_chip, problems_panel, short_id

EARLIER, LATER, OUT = "earlier", "later", "out"
SIGNS = {EARLIER: "↑", LATER: "↓", OUT: "✕"}
# A new list reuses the old one's elements, so the focus would stay in place while the run moves; it goes with the run.
ACT = """
let pressed = null;
element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-act]');
  if (!button || button.getAttribute('aria-disabled') === 'true') return;
  pressed = [button.dataset.run, button.dataset.act];
  trigger('select', { run: pressed[0], act: pressed[1] });
});
watch('value', () => {
  const focused = document.activeElement;
  if (!pressed || !(focused === document.body || element.contains(focused))) return;
  const same = [...element.querySelectorAll('button[data-act]')].find(
    (button) => button.dataset.run === pressed[0] && button.dataset.act === pressed[1]);
  if (same) same.focus();
  pressed = null;
});
"""


def waiting_html(found: Sequence[RunStatus]) -> str:
    """Empty when nothing waits."""
    runs = sorted((status for status in found if status.state == QUEUED), key=lambda s: s.queue_place or 0)
    if not runs:
        return ""
    items = "".join(_item(status, last=status is runs[-1], known=found) for status in runs)
    return (
        f'<div class="lab-card lab-waiting"><b id="waiting-title">Waiting</b>'
        f'<ol aria-labelledby="waiting-title">{items}</ol></div>'
    )


def _item(status: RunStatus, *, last: bool, known: Sequence[RunStatus]) -> str:
    name = f"{esc(status.name)}{short_id(status, known)}"
    labels = {EARLIER: f"move {status.name} earlier", LATER: f"move {status.name} later"}
    labels[OUT] = f"take {status.name} out of the queue"
    off = {EARLIER} if status.queue_place == 1 else set()
    off |= {LATER} if last else set()
    buttons = "".join(
        f'<button type="button" data-act="{act}" data-run="{esc(status.run_id)}" aria-label="{esc(label)}" '
        f'title="{esc(label)}" aria-disabled="{str(act in off).lower()}">{SIGNS[act]}</button>'
        for act, label in labels.items()
    )
    return (
        f'<li><span class="place">{status.queue_place}.</span><span class="name">{name}</span>'
        f'<span class="method">{method_chip(status.method)} r{status.rank}</span>'
        f'<span class="acts">{buttons}</span></li>'
    )


def act_on(run_id: str, act: str, settings: Settings) -> str:
    """Move a waiting run by one place or take it out; the problem as HTML, or nothing.

    Its place is read now: another browser may have moved it since this one drew the list.
    """
    try:
        run = RunStore(settings).get(run_id)
        place = run.queue_place()
        if place is None:
            state = run.status().state
            remedy = "; choose it in the table to stop it" if state == RUNNING else ""
            raise RunError(f"{run_id}: waits no longer, it is {state}{remedy}")
        if act == OUT:
            run.request_stop()
        else:
            queue.move(run, max(1, place + (1 if act == LATER else -1)))
    except LabError as error:
        return problems_panel(error.problems, title="The queue has changed meanwhile")
    return ""
