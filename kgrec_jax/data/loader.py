"""Batches in the order of their step, made ahead of time in threads."""

from __future__ import annotations

from typing import Any, Protocol

import grain


class Source(Protocol):
    """All batches of a run: `source[step]` is a pure function of the step, so a run can go on from any of them."""

    def __len__(self) -> int: ...

    def __getitem__(self, step: int) -> Any: ...


class _Steps:
    """A source as grain wants it: a random-access sequence that may be shorter than its first `start` steps."""

    def __init__(self, source: Source):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, step: int) -> Any:
        # A batch is one opaque element to grain: a pytree or a dataclass, not something to be batched or inspected.
        return self._source[int(step)]


def iterate(source: Source, position: int = 0, threads: int = 2, ahead: int = 4) -> grain.DatasetIterator:
    """An iterator over source[position], source[position + 1], …; its `get_state()` tells the position it has reached.

    `threads` make up to `ahead` batches while the device works; the order is the source's whatever their number.
    """
    dataset = grain.MapDataset.source(_Steps(source))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    iterator = iter(dataset.to_iter_dataset(options))
    iterator.set_state({"next_index": position})
    return iterator
