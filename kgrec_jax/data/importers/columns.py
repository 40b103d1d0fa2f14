"""What a column of an item table can be in a graph: a category, a list of them, a number in buckets, or nothing."""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import numpy as np

from kgrec_jax.data.buckets import FEW, NUMERIC, bucket_of, cuts, number, said, span
from kgrec_jax.errors import KgrecError

Kind = Literal["category", "list", "buckets", "skip"]
SEPARATORS = ("|", ";", "、", "，", ", ", ",", " / ", "/")
_NAMES = ("title", "name", "item_name", "item_title")
_MISSING = ("", "unknown", "nan", "none", "null", "n/a", r"\n", "(no genres listed)")
_WORDS, _LETTERS = 8, 60  # on average, from which a column is free text
_PART_WORDS = 5  # on average, up to which the parts of a cell are values of a list


@dataclasses.dataclass(frozen=True)
class Choice:
    """What is made of a column, and why."""

    kind: Kind
    separator: str = ""  # of a list
    edges: tuple[float, ...] = ()  # of stated buckets: where the second and later ones begin
    buckets: int = 5  # of about equal size, where no edges are stated
    reason: str = ""

    def words(self) -> str:
        """The choice as it is shown, and as --columns takes it."""
        if self.kind == "list":
            return f"list:{self.separator}"
        if self.kind == "buckets":
            return f"buckets:{','.join(f'{e:g}' for e in self.edges) if self.edges else self.buckets}"
        return self.kind


@dataclasses.dataclass(frozen=True)
class ColumnConfig:
    """What is taken for a category."""

    max_values: int = 10_000  # distinct values of a column
    min_shared: float = 0.2  # share of an item's values that another item has too; below, they tell items apart
    buckets: int = 5  # of a numeric column


def parse_choice(words: str) -> tuple[str, Choice]:
    """(column, choice) of `COLUMN=category`, `=list:SEPARATOR`, `=buckets:N`, `=buckets:EDGE,EDGE…` or `=skip`."""
    column, equals, rest = words.rpartition("=")
    kind, colon, value = rest.partition(":")
    expected = "COLUMN=category, COLUMN=list:SEPARATOR, COLUMN=buckets:N, COLUMN=buckets:EDGE,EDGE or COLUMN=skip"
    if not equals or not column or kind not in ("category", "list", "buckets", "skip"):
        raise KgrecError(f"--columns: found {words!r}, expected {expected}")
    if (colon and kind in ("category", "skip")) or (kind == "list" and not value):
        raise KgrecError(f"--columns: found {words!r}, expected {expected}")
    asked = "--columns says so"
    if kind != "buckets":
        return column, Choice(kind, separator=value, reason=asked)
    if not colon or (value.isdecimal() and int(value) > 1):
        return column, Choice(kind, buckets=int(value) if colon else ColumnConfig.buckets, reason=asked)
    try:
        edges = tuple(float(edge) for edge in value.split(",") if edge.strip())
    except ValueError:
        edges = ()
    if not edges or not np.isfinite(edges).all() or any(a >= b for a, b in zip(edges, edges[1:])) or value.isdecimal():
        raise KgrecError(f"--columns: found the buckets {value!r} of {column}, expected their number (2 or more) or "
                         "ascending edges such as 1980,1990 (one edge: 1980,)")
    return column, Choice(kind, edges=edges, reason=asked)


def clean(value: str) -> str:
    """A cell's value in one line, NFKC; "" where it says that nothing is known."""
    value = " ".join(unicodedata.normalize("NFKC", value).split())
    return "" if value.lower() in _MISSING else value


def split(value: str, separator: str) -> list[str]:
    """The values of a cell, each once; brackets and quotes around them, as JSON and Python write lists, are dropped."""
    if value[:1] == "[" and value[-1:] == "]":
        value = value[1:-1]
    parts = (clean(part.strip().strip("'\"")) for part in value.split(separator))
    return list(dict.fromkeys(part for part in parts if part))


def choose(name: str, values: Sequence[str], cfg: ColumnConfig = ColumnConfig()) -> Choice:
    """What a column of cleaned values looks like, with the reason in words.

    A category is what several items share: a column whose values mostly belong to one item each says which item it is
    and brings no two together. Lists are recognised by a separator whose parts are shared more than the whole cells.
    """
    there = [value for value in values if value]
    if not there:
        return Choice("skip", reason="it is empty")
    count = Counter(there)
    if name.lower() in _NAMES:
        return Choice("skip", reason="it names the item")
    if len(count) == 1:
        return Choice("skip", reason=f"all values are {there[0]!r}")
    if re.search(r"(^|_)(id|url|uri|link|image|img|poster|isbn|asin)$", name.lower()) and len(count) > 0.9 * len(there):
        return Choice("skip", reason="its values are keys of single items")
    numbers = np.array([number(value) for value in there])
    numeric = float(np.isfinite(numbers).mean())
    if numeric >= NUMERIC and len(count) > FEW:
        return Choice("buckets", buckets=cfg.buckets, reason=f"{numeric:.0%} of the values are numbers or dates")
    separator = _separator(there)
    if not separator and (reason := _free_text(there)):
        return Choice("skip", reason=reason)
    parts = [split(value, separator) if separator else [value] for value in there]
    count = Counter(part for row in parts for part in row)
    shared = sum(n for n in count.values() if n > 1) / max(sum(count.values()), 1)
    if shared < cfg.min_shared:
        return Choice("skip", reason=f"too many distinct values ({len(count):,} in {len(there):,} cells: only "
                                     f"{shared:.0%} are shared by several items)")
    if len(count) > cfg.max_values:
        return Choice("skip", reason=f"too many distinct values ({len(count):,}, more than {cfg.max_values:,})")
    found = f"{len(count):,} distinct values, {shared:.0%} shared by several items"
    return Choice("list" if separator else "category", separator=separator, reason=found)


def _free_text(values: Sequence[str]) -> str:
    words = sum(len(value.split()) for value in values) / len(values)
    letters = sum(len(value) * (2 if value and value[0] >= "\u3040" else 1) for value in values) / len(values)
    if words > _WORDS or letters > _LETTERS:
        return f"it is free text ({words:.0f} words, {letters:.0f} characters on average)"
    return ""


def _separator(values: Sequence[str]) -> str:
    """The separator whose parts repeat most, where they repeat at least twice as often as the cells do; "" for none."""
    best, found, whole = "", 2.0 * len(values) / len(set(values)), len(values)
    for separator in SEPARATORS:
        several = sum(separator in value for value in values)
        if several < max(2, 0.02 * whole):
            continue
        parts = [part for value in values for part in split(value, separator)]
        if not parts or sum(len(part.split()) for part in parts) > _PART_WORDS * len(parts):
            continue  # the clauses of a sentence
        repeats = len(parts) / len(set(parts))
        if repeats > found:
            best, found = separator, repeats
    return best


def bucket_names(values: np.ndarray, choice: Choice) -> list[str]:
    """A bucket's name for each finite value, "" for NaN.

    Stated edges begin buckets ("under 10", "10 to under 20", "20 and more"); else quantiles do, equal values stay
    together and a bucket is named by the least and the greatest value in it ("1990 to 1994").
    """
    finite = np.isfinite(values)
    known = values[finite]
    if choice.edges:
        edges = choice.edges
        names = [f"under {said(edges[0])}", *(f"{said(a)} to under {said(b)}" for a, b in zip(edges, edges[1:])),
                 f"{said(edges[-1])} and more"]
        rows = np.searchsorted(edges, known, side="right")
    else:
        rows = bucket_of(known, cuts(known, choice.buckets))
        names = [span(known[rows == k].min(), known[rows == k].max()) for k in range(int(rows.max()) + 1)]
    out = [""] * len(values)
    for place, row in zip(np.flatnonzero(finite).tolist(), rows.tolist(), strict=True):
        out[place] = names[row]
    return out
