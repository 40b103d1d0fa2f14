"""RecBole's atomic files: tab-separated, without quoting, under a header of NAME:TYPE
(https://recbole.io/docs/user_guide/data/atomic_files.html)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from kgrec_jax.data.tables import Coded, read_table
from kgrec_jax.errors import KgrecError

TYPES = ("token", "token_seq", "float", "float_seq")


@dataclasses.dataclass(frozen=True)
class Atomic:
    """One atomic file: its columns by bare name, as strings."""

    path: Path
    columns: dict[str, Coded | list[str]]
    types: dict[str, str]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def column(self, *names: str, kind: str = "") -> str:
        """The first of `names` that the file has, else the first column with one of them in its name; "" for none."""
        of_kind = [c for c in self.columns if not kind or self.types[c] == kind]
        exact = [n for n in names if n in of_kind]
        partial = [c for n in names for c in of_kind if n in c.lower()]
        return (exact + partial + [""])[0]


def read_atomic(path: Path, *, log: bool = False) -> Atomic:
    """Read a tab-separated file whose header is NAME:TYPE; errors carry file and line.

    Token columns of a `log` come out as Coded, and an empty one is an error.
    """
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        header = file.readline().rstrip("\r\n").split("\t")
    types: dict[str, str] = {}
    for field in header if path.stat().st_size else []:
        name, _, kind = field.partition(":")
        if kind not in TYPES or not name or name in types:
            raise KgrecError(f"{path}:1: found the column {field!r}, expected NAME:TYPE once, "
                             f"with a TYPE of {', '.join(TYPES)}")
        types[name] = kind
    ids = {f"{name}:{kind}": "id" for name, kind in types.items() if log and kind == "token"}
    table = read_table(path, ids, rest_as_text=True)
    return Atomic(path, {name: table[f"{name}:{kind}"] for name, kind in types.items()}, types)


@dataclasses.dataclass(frozen=True)
class Item:
    """A row of the .item file, its columns by what they mean."""

    id: str
    title: str
    year: str
    genres: tuple[str, ...]
    extra: dict[str, str]


def find_atomic(source: Path, suffix: str) -> Path | None:
    """The file NAME.suffix of the folder, None without one; KgrecError where there are several."""
    found = sorted(p for p in source.iterdir() if p.name.endswith(suffix) and p.name.count(".") == 1)
    if len(found) > 1:
        raise KgrecError(f"{source}: found {', '.join(p.name for p in found)}, expected one {suffix} file")
    return found[0] if found else None
