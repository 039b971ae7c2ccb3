"""Measured figures in words: units, sensible digits, names of methods. Knows no page and no run."""

from qlora_core.data.rows import counted
from qlora_core.devices import GIB

METHOD_NAMES = {"lora": "LoRA", "qlora": "QLoRA"}
# Parts of a run's memory, by the name that its estimate has: (short name, what it is).
MEMORY_PARTS = {
    "libraries": ("libraries", "the worker process before a model is loaded"),
    "weights": ("weights", "the frozen base"),
    "quantisation constants": ("4-bit constants", "quantisation constants of the weights"),
    "adapters": ("adapters", "what is learnt, in fp32, and its copies in 16 bits"),
    "optimizer": ("optimizer", "the two moments of AdamW"),
    "gradients": ("gradients", "of the adapters"),
    "activations": ("activations", "kept from the forward to the backward pass"),
    "working": ("working", "of the layer that runs, and buffers of the libraries"),
    "logits": ("logits", "and their gradients"),
    "context": ("context, gaps", "the driver’s context, and memory lost to fragmentation"),
}


def size(number: float | None) -> str:
    """Bytes with a unit and sensible digits."""
    if number is None:
        return "–"
    if number >= 0.1 * GIB:
        return f"{number / GIB:.2f} GiB"
    if number >= 1024**2:
        return f"{number / 1024**2:.1f} MiB"
    return f"{number / 1024:.1f} KiB" if number >= 1024 else counted(number, "byte")


def seconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f} s" if value < 1 else f"{value:.2f} s" if value < 10 else f"{value:.0f} s"


def loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def duration(value: float) -> str:
    """How long something still takes, no more exact than it can be known."""
    if value < 60:
        return "less than a minute"
    minutes = round(value / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
