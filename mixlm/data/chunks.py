"""A stream, some items at a time."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")


def in_chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items, the last one perhaps shorter. (Python's own `itertools.batched` begins with 3.12.)"""
    remaining = iter(items)
    while chunk := list(islice(remaining, size)):
        yield chunk
