"""The device that a run of some settings would train on. The only part of the planner that looks at the machine."""

from qlora_core import devices
from qlora_core.config import TrainConfig
from qlora_core.memory import GIB
from qlora_core.planner.facts import Device


def device_for(config: TrainConfig) -> Device:
    """The first GPU, or the CPU where there is none or it is asked for."""
    found, host_bytes = () if config.device == "cpu" else devices.gpus(), devices.host_memory().available_bytes
    if not found:
        return Device("the CPU", host_bytes, False, devices.cpu_has_bf16())
    return Device(found[0].name, found[0].total_bytes, True, found[0].capability >= (8, 0), host_bytes)


def card_of(gib: float) -> Device:
    """A GPU that is not here, with bf16."""
    return Device(f"a card of {gib:g} GiB", round(gib * GIB), True, True)
