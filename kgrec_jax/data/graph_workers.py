"""One function over the pieces of a dump, in this process or in several, with progress by the bytes read."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
from collections.abc import Callable, Sequence
from typing import Any

from kgrec_jax.data.rdf_terms import Piece
from kgrec_jax.tracking import Tracker

_SMALL = 1 << 25  # bytes; a process takes longer to start than to parse them


class Workers:
    """Runs `function(piece, number, told, *arguments)` for every piece; a context, for its processes end with it."""

    def __init__(self, pieces: Sequence[Piece], processes: int, tracker: Tracker):
        self._pieces, self._tracker = pieces, tracker
        self._sizes = [(p.stop if p.stop >= 0 else p.path.stat().st_size) - p.start for p in pieces]
        self._pool = None
        if processes > 1 and len(pieces) > 1 and sum(self._sizes) >= _SMALL:
            context = multiprocessing.get_context("spawn")  # a fork would copy JAX's threads in mid-flight
            self._pool = concurrent.futures.ProcessPoolExecutor(min(processes, len(pieces)), context)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def map(self, label: str, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """The results in the order of the pieces; an error of one ends them all."""
        with self._tracker.progress(f"{label} (MB)", max(sum(self._sizes) >> 20, 1)) as bar:
            read = [0, 0]  # bytes, megabytes shown

            def told(count: int) -> None:
                read[0] += count
                if read[0] >> 20 > read[1]:
                    bar.advance((read[0] >> 20) - read[1])
                    read[1] = read[0] >> 20

            if not self._pool:
                return [function(piece, number, told, *arguments) for number, piece in enumerate(self._pieces)]
            futures = [self._pool.submit(function, piece, number, None, *arguments)
                       for number, piece in enumerate(self._pieces)]
            sizes = dict(zip(futures, self._sizes, strict=True))
            for future in concurrent.futures.as_completed(futures):
                future.result()
                told(sizes[future])
            return [future.result() for future in futures]

    def each(self, function: Callable[..., Any], numbers: Sequence[int], *arguments: Any) -> list[Any]:
        """`function(number, *arguments)` for every number, in their order."""
        if not self._pool:
            return [function(number, *arguments) for number in numbers]
        futures = [self._pool.submit(function, number, *arguments) for number in numbers]
        return [future.result() for future in futures]
