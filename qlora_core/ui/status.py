"""The line on top of every tab: what this machine has, what runs now and how long it still takes."""

from collections.abc import Sequence

from qlora_core import devices
from qlora_core.data.rows import counted
from qlora_core.run_status import QUEUED, RUNNING, RunStatus
from qlora_core.ui.words import duration, esc, size


def status_html(statuses: Sequence[RunStatus]) -> str:
    running = [status for status in statuses if status.state == RUNNING]
    waiting = sum(status.state == QUEUED for status in statuses)
    now = "; ".join(_running(status) for status in running) or "nothing is running"
    if waiting:
        now += f"; {waiting} waiting"
    return (
        f'<div class="lab-status"><b>QLoRA Lab</b><span class="device">{esc(_device())}</span>'
        f'<span class="now{" busy" if running else ""}">{esc(now)}</span></div>'
    )


def _device() -> str:
    found = devices.gpus()
    if not found:
        return "CPU only: fine for the demo, slow for real models"
    names = [f"{gpu.name} · {gpu.used_bytes / devices.GIB:.1f} of {size(gpu.total_bytes)}" for gpu in found]
    return f"{counted(len(found), 'GPU')}: {names[0]} …" if len(found) > 2 else " · ".join(names)


def _running(status: RunStatus) -> str:
    where = f"step {status.step} of {status.total_steps}" if status.total_steps else "starting"
    left = f", {duration(status.eta_seconds)} left" if status.eta_seconds else ""
    return f'"{status.name}" {where}{left}'
