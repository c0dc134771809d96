"""The peak of tensor memory of one step: every storage that lives, counted from its making to its release.

What is alive before the step (parameters, optimizer state, buffers) is found among Python's objects; during the step
each operation's results are added, and a storage is subtracted when it is gone, whoever held it last. The number
repeats from run to run, which resident memory (allocator caches, pages, libraries) does not. Left out are the process
itself, scratch inside single kernels, and Gloo's own buffers. (PyTorch's profiler would see scratch, but it misses
what Gloo's threads release.)
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Ledger(TorchDispatchMode):
    """Counts the bytes of live storages, and remembers the most."""

    def __init__(self, alive: Iterator[Tensor]) -> None:
        super().__init__()
        self.bytes_by_storage: dict[int, int] = {}
        self.current: int = 0
        self.peak: int = 0
        for tensor in alive:
            self.count(tensor)

    def count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.bytes_by_storage:
            self.bytes_by_storage[key] = storage.nbytes()
            self.current += storage.nbytes()
            self.peak = max(self.peak, self.current)
            weakref.finalize(storage, self._release, key).atexit = False

    def _release(self, key: int) -> None:
        self.current -= self.bytes_by_storage.pop(key)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if type(leaf) is Tensor and leaf.device.type == "cpu":
                self.count(leaf)
        return result


def live_tensors() -> Iterator[Tensor]:
    """All tensors on the CPU that Python can reach."""
    for thing in gc.get_objects():
        if type(thing) in (Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
            yield thing


def peak_bytes(step: Callable[[], object]) -> int:
    """The most bytes of tensors alive at once during `step`."""
    gc.collect()
    with _Ledger(live_tensors()) as ledger:
        step()
    return int(ledger.peak)
