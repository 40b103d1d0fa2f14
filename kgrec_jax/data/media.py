"""Precomputed vectors of items: media/NAME.npy [n, d] with one item id a line in media/NAME.ids.txt.

Raw files in media/NAME/ (`media_files`) become vectors of that name in the fusion stage.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping

import numpy as np

from kgrec_jax.data.lines import read_lines
from kgrec_jax.errors import KgrecError

RESERVED = ("text", "words", "graph", "id")  # names of the other parts of an item's features


def check_names(folder: pathlib.Path, vectors: Iterable[str], raw: Iterable[str]) -> None:
    """KgrecError where two features of the items would have one name."""
    taken = next((name for name in (*vectors, *raw) if name in RESERVED), None)
    if taken is not None:
        raise KgrecError(f"{folder / 'media'}: found the name {taken!r}, which is that of another feature, expected "
                         f"any but {', '.join(RESERVED)}; rename it")
    twice = next((name for name in raw if name in set(vectors)), None)
    if twice is not None:
        raise KgrecError(f"{folder / 'media'}: found {twice}.npy and the folder {twice}/, expected a name of its own "
                         "for each; rename one of them")


def read_ids(path: pathlib.Path) -> list[str]:
    """The identifiers of a file with one a line, each once; empty lines at the end do not count."""
    if not path.is_file():
        raise KgrecError(f"{path}: found no such file, expected one item id a line; check the path")
    lines = read_lines(path)
    while len(lines) > 1 and not lines[-1]:
        lines.pop()
    seen: dict[str, int] = {}
    for number, identifier in enumerate(lines, 1):
        if not identifier:
            raise KgrecError(f"{path}:{number}: found an empty line, expected one item id a line; remove it")
        if identifier in seen:
            raise KgrecError(f"{path}:{number}: found {identifier!r}, which stands on line {seen[identifier]} too, "
                             "expected each id once")
        seen[identifier] = number
    return lines


def read_media(folder: pathlib.Path, items: Mapping[str, int]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """name -> ([I, d] float32 with zeros where an item has no vector, [I] bool which items have one)."""
    media = {}
    for path in sorted((folder / "media").glob("*.npy")):
        ids_path = path.with_name(f"{path.stem}.ids.txt")
        ids = read_ids(ids_path)
        try:
            vectors = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise KgrecError(f"{path}: found something that is not a NumPy array ({str(error).splitlines()[0]}), "
                             f"expected [n, d] float16 or float32; write it with numpy.save") from None
        if vectors.ndim != 2 or vectors.dtype.kind != "f":
            raise KgrecError(f"{path}: found an array {list(vectors.shape)} of {vectors.dtype}, expected [n, d] "
                             "float16 or float32")
        if len(vectors) != len(ids):
            raise KgrecError(f"{path}: found {len(vectors):,} vectors and {len(ids):,} ids in {ids_path.name}, "
                             "expected as many of each")
        unknown = next((n for n, i in enumerate(ids) if i not in items), None)
        if unknown is not None:
            raise KgrecError(f"{ids_path}:{unknown + 1}: found the item {ids[unknown]!r}, expected an item of the data "
                             "set; remove its row")
        rows = np.array([items[i] for i in ids], np.int64)
        values = np.zeros((len(items), vectors.shape[1]), np.float32)
        values[rows] = vectors
        bad = np.flatnonzero(~np.isfinite(values[rows]).all(1))
        if len(bad):
            raise KgrecError(f"{path}: found NaN or infinity in vector {bad[0]} (item {ids[bad[0]]!r}), expected "
                             "finite numbers")
        present = np.zeros(len(items), bool)
        present[rows] = True
        media[path.stem] = (values, present)
    return media
