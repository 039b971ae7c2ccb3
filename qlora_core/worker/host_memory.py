"""Activations of a GPU in host memory, copied there and back beside the computing."""

import torch

from qlora_core.errors import TrainingError


class HostMemory:
    """Layers' inputs in pinned host memory, copied there and back beside the computing.

    A tensor on its way out is held until the one after next is put, and the GPU then waits for its copy: it rarely has to, and
    memory is never written over before it is copied.
    """

    def __init__(self, device: torch.device) -> None:
        self.copying = torch.cuda.Stream(device)
        self.places: dict[int, torch.Tensor] = {}
        self.device, self.shape = device, torch.Size()
        self.leaving: list[tuple[torch.Tensor, torch.cuda.Event]] = []
        self.coming: dict[int, tuple[torch.Tensor, torch.cuda.Event]] = {}

    def begin(self, like: torch.Tensor) -> None:
        """For inputs of this shape; forget what a pass that ran out of memory has left, once it has arrived."""
        torch.cuda.current_stream().wait_stream(self.copying)
        self.shape, self.leaving, self.coming = like.shape, [], {}

    def put(self, number: int, x: torch.Tensor) -> None:
        if number not in self.places or self.places[number].numel() < x.numel():
            self.places[number] = self._pinned(x)
        self.copying.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.copying):
            self.places[number][: x.numel()].view_as(x).copy_(x, non_blocking=True)
        self.leaving.append((x, self.copying.record_event()))
        if len(self.leaving) > 2:
            torch.cuda.current_stream().wait_event(self.leaving.pop(0)[1])

    def _pinned(self, x: torch.Tensor) -> torch.Tensor:
        try:
            return torch.empty(x.numel(), dtype=x.dtype, pin_memory=True)
        except RuntimeError as error:  # the host has no more memory that can be pinned
            raise TrainingError(
                f"out of host memory for offloaded activations, at {len(self.places)} layers of {x.nbytes / 2**20:.0f} MiB: lower "
                "max_seq_length, or set activation_checkpointing to full"
            ) from error

    def take(self, number: int) -> torch.Tensor:
        """The input of layer `number`; that of the layer before it sets out meanwhile."""
        while self.leaving:
            torch.cuda.current_stream().wait_event(self.leaving.pop(0)[1])
        for wanted in (number, number - 1):
            if wanted >= 0 and wanted not in self.coming:
                self._send_for(wanted)
        x, arrived = self.coming.pop(number)
        torch.cuda.current_stream().wait_event(arrived)
        return x

    def _send_for(self, number: int) -> None:
        x = torch.empty(self.shape, dtype=self.places[number].dtype, device=self.device)
        self.copying.wait_stream(torch.cuda.current_stream())  # what was in this memory before has been read
        with torch.cuda.stream(self.copying):
            x.copy_(self.places[number][: x.numel()].view_as(x), non_blocking=True)
        self.coming[number] = x, self.copying.record_event()
