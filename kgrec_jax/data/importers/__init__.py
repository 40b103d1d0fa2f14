"""Data sets in other layouts, turned into a dataset folder."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from kgrec_jax.data.tables import Coded, write_tsv


def write_new_folder(out: Path, tables: Mapping[str, Mapping[str, Coded | Sequence[str]]]) -> None:
    """Writes {name: columns} as NAME.tsv into `out`, which is empty or absent: it appears complete or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        folder = Path(scratch) / "folder"
        folder.mkdir()
        for name, columns in tables.items():
            write_tsv(folder / f"{name}.tsv", columns)
        if out.exists():
            out.rmdir()
        folder.rename(out)
