"""Which memory operators have made and not freed yet, at any moment: what profiling and planning count."""

import weakref
from collections.abc import Iterator, Set
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """While it is on, keeps account of the memory that operators make and that is freed again.

    Memory is counted once, whatever the number of tensors on it and whoever holds it. What an operator takes and frees
    within itself is not seen. Tensors may be without content (torch's FakeTensor); with content, gradients that meet
    are added in a new tensor, as torch does under any dispatch mode.
    """

    def __init__(self) -> None:
        super().__init__()
        self._changes: list[tuple[int, int]] = []  # (number of a storage, bytes: negative when it is freed)
        self._numbers: dict[int, int] = {}  # of each live storage, by its identity

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        in_backward = torch._C._current_graph_task_id() != -1
        is_sum = operator is torch.ops.aten.add.Tensor and isinstance(args[0], FakeTensor)
        if is_sum and in_backward and not args[0]._is_view():
            # Gradients that meet. Without a dispatch mode torch adds them in place where nothing else has the memory.
            # Whether something has it cannot be told here; so only what has no content to be spoilt is added in place.
            operator = torch.ops.aten.add_.Tensor
        given = {storage._cdata for storage in storages((args, kwargs))}
        result = operator(*args, **kwargs)
        for storage in storages(result):
            if storage._cdata not in given and storage._cdata not in self._numbers:
                self._numbers[storage._cdata] = len(self._changes)
                self._changes.append((len(self._changes), storage.nbytes()))
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes()).atexit = False
        return result

    def _free(self, identity: int, size: int) -> None:
        if (number := self._numbers.pop(identity, None)) is not None:
            self._changes.append((number, -size))

    def disregard(self, tensor: Tensor) -> None:
        """Count the memory of a tensor as freed from now on."""
        storage = tensor.untyped_storage()
        self._free(storage._cdata, storage.nbytes())

    def live(self) -> set[int]:
        """The numbers of all storages that are alive."""
        return set(self._numbers.values())

    def numbers(self, tensors: Any) -> set[int]:
        """The numbers of the storages of tensors in nested values, as far as they were made under the mode."""
        given = {storage._cdata for storage in storages(tensors)}
        return {number for identity, number in self._numbers.items() if identity in given}

    def size(self, numbers: set[int]) -> int:
        """Bytes of these storages."""
        return sum(change for number, change in self._changes if number in numbers and change > 0)

    def moment(self) -> int:
        """Now, for `peaks`."""
        return len(self._changes)

    def peak(self, without: Set[int] = frozenset()) -> int:
        """The most bytes at any time, not counting some storages."""
        now = highest = 0
        for number, change in self._changes:
            if number not in without:
                now += change
                highest = max(highest, now)
        return highest

    def peaks(self, moments: list[int]) -> list[int]:
        """The most bytes at any time up to the first of these moments, and between each and the next."""
        now, highest = 0, []
        for first, last in pairwise([0, *moments]):
            highest.append(now)
            for _, change in self._changes[first:last]:
                now += change
                highest[-1] = max(highest[-1], now)
        return highest


def storages(values: Any) -> Iterator[torch.UntypedStorage]:
    """The memory of all tensors in nested values; empty ones have none."""
    found = (value.untyped_storage() for value in tree_leaves(values) if isinstance(value, Tensor))
    return (storage for storage in found if storage.nbytes())


def tensor_bytes(tensors: Any) -> int:
    """The memory of all tensors in nested values, what they share once."""
    return sum({storage._cdata: storage.nbytes() for storage in storages(tensors)}.values())
