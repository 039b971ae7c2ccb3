"""How far a job is, as a bar with words. Starts and reads nothing."""

from qlora_core import jobs
from qlora_core.ui.words import duration, esc, size


def progress_html(progress: jobs.Progress | None) -> str:
    if progress is None:
        return ""
    share = min(1.0, progress.done / progress.total) if progress.total else None
    amount = ""
    if progress.unit == "bytes":
        amount = f"{size(progress.done)} of {size(progress.total)}"
    elif progress.done:
        amount = f"{progress.done:,}" + (f" of {progress.total:,}" if progress.total else "") + f" {progress.unit}"
    left = ""
    if share and share > 0.02 and progress.seconds > 2:
        left = f"{duration(progress.seconds / share - progress.seconds)} left"
    width = f"{share:.0%}" if share is not None else "100%"
    moving = "" if share is not None else " moving"
    words = " · ".join(filter(None, (amount, left)))
    return (
        f'<div class="lab-job" role="status"><div>{esc(progress.doing[:1].upper() + progress.doing[1:])} …</div>'
        f'<div class="lab-bar{moving}" style="--hue: var(--running)"><i style="width:{width}"></i></div>'
        f'<div class="lab-bar-words"><span>{esc(words) or "&nbsp;"}</span></div></div>'
    )
