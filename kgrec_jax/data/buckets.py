"""Numbers as entities of a graph: what text is a number, where buckets of equal size begin, what they are called."""

from __future__ import annotations

import re

import numpy as np

_NUMBER = re.compile(r"[$€£¥]?\s?([+-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][+-]?\d+)?)\s?[%$€£¥]?")
_DATE = re.compile(r"(-?\d{4,})[-/.](?:0?[1-9]|1[0-2])(?:[-/.]\d{1,2})?(?:[T ].*)?")
NUMERIC = 0.95  # share of the values that are numbers, from which a column or a relation is numeric
FEW = 10  # distinct numbers up to which each is a value of its own


def number(value: str) -> float:
    """The number that a value is (`1,250`, `$9.99`, `12 %`), the year of a date (`1995-07-01`), else NaN."""
    if date := _DATE.fullmatch(value):
        return float(date[1])
    found = _NUMBER.fullmatch(value)
    return float(found[1].replace(",", "")) if found else float("nan")


def cuts(values: np.ndarray, buckets: int) -> np.ndarray:
    """Ascending greatest values of all buckets but the last one, [at most buckets - 1].

    Buckets hold about the same number of `values` (finite); equal values are never parted, so there may be fewer.
    """
    at = np.quantile(values, np.arange(1, buckets) / buckets, method="inverted_cdf")
    return np.unique(at[at < values.max()])


def bucket_of(values: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The bucket of each value, 0 … len(ends): a cut ends its bucket."""
    return np.searchsorted(ends, values, side="left")


def span(low: float, high: float) -> str:
    """The name of a bucket by the least and the greatest value in it."""
    return said(low) if low == high else f"{said(low)} to {said(high)}"


def said(value: float) -> str:
    """A number in as few digits as say it."""
    return f"{value:.0f}" if float(value).is_integer() and abs(value) < 1e15 else f"{value:g}"
