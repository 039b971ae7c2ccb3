"""A folder of safetensors as a mapping from names to tensors, each read when it is asked for. Knows no architecture."""

import ctypes
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Pages of a mapped file that were read count as this process's memory for as long as anything of that mapping is used: so a
# file is mapped anew after this much, and a tensor so small that a model keeps it as it is, a norm, is copied out.
REOPEN_AFTER_BYTES = 64 * 1024**2
COPY_BELOW_BYTES = 1024**2

# Makes a shard readable while the context is open, and says where it lies; a real one lies in the folder already.
ShardAtHand = Callable[[Path], AbstractContextManager[Path]]


class Shards(Mapping[str, "LazyTensor"]):
    """The tensors of a model folder, with one shard open at a time, so that no more of it is in memory than is being read.

    transformers takes this for a state dict: it reads names first, then tensor after tensor in the order of the layers.
    Raises OSError where the folder has no weights, ValueError where its index cannot be read.
    """

    def __init__(self, folder: Path, at_hand: ShardAtHand = nullcontext) -> None:
        self._folder, self._at_hand = folder, at_hand
        self._reading = threading.Lock()  # transformers reads 16-bit models with several threads
        self._shard = ExitStack()
        self._file, self._path, self._handle, self._read_bytes = "", folder, None, 0
        self._file_of: dict[str, str] = self._find()

    def _find(self) -> dict[str, str]:
        if (self._folder / SINGLE).is_file():
            with safe_open(self._folder / SINGLE, framework="pt") as file:
                return dict.fromkeys(file.keys(), SINGLE)
        if not (self._folder / INDEX).is_file():
            raise OSError(f"it has neither {SINGLE} nor {INDEX}")
        weight_map = json.loads((self._folder / INDEX).read_text()).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{INDEX} has no weight_map")
        return weight_map

    def __enter__(self) -> "Shards":
        return self

    def __exit__(self, *_: Any) -> None:
        self._close()
        give_back_freed_memory()

    def __getitem__(self, name: str) -> "LazyTensor":
        if name not in self._file_of:
            raise KeyError(name)
        return LazyTensor(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def read(self, name: str, use: Callable[[Any], Any]) -> Any:
        """What `use` makes of safetensors' slice of that name."""
        with self._reading:
            if self._file != self._file_of[name]:
                self._close()
                self._path = self._shard.enter_context(self._at_hand(self._folder / self._file_of[name]))
                self._file = self._file_of[name]
            if self._handle is None or self._read_bytes >= REOPEN_AFTER_BYTES:
                self._handle, self._read_bytes = safe_open(self._path, framework="pt"), 0
                give_back_freed_memory()
            found = use(self._handle.get_slice(name))
            self._read_bytes += found.nbytes if isinstance(found, torch.Tensor) else 0
            return found

    def _close(self) -> None:
        self._file, self._handle = "", None
        self._shard.close()


class LazyTensor:
    """A tensor that is not read yet, with the methods of safetensors' slices: `tensor[...]` reads it."""

    def __init__(self, shards: Shards, name: str) -> None:
        self._shards, self._name = shards, name

    def __getitem__(self, index: Any) -> torch.Tensor:
        tensor = self._shards.read(self._name, lambda slice_: slice_[index])
        return tensor.clone() if tensor.nbytes < COPY_BELOW_BYTES else tensor

    def get_shape(self) -> list[int]:
        return self._shards.read(self._name, lambda slice_: slice_.get_shape())

    def get_dtype(self) -> str:
        return self._shards.read(self._name, lambda slice_: slice_.get_dtype())


def give_back_freed_memory() -> None:
    """glibc keeps what quantising on a CPU has freed, between pieces that stay: measured, twice the 16-bit weights."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
