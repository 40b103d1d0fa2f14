"""Labelled texts in CLUE's format, as examples and as batches of fixed shape; plain texts for contrast.

A folder has train and dev as .jsonl or .json (one object a line) or .tsv (with a header): {"sentence", "label"} or
{"sentence1", "sentence2", "label"}, as CLUE's files have (Xu et al. 2020); other fields are not read.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Literal

import jax
import numpy as np

from kgrec_jax.data import lines
from kgrec_jax.data.text import Tokenizer
from kgrec_jax.errors import KgrecError

Task = Literal["classification", "matching", "regression", "simcse"]
PARTS = ("train", "dev")
_SUFFIXES = (".jsonl", ".json", ".tsv")
_NOT_A_PAIR = ("0", "0.0", "false")  # labels of a pair that does not belong together


@dataclasses.dataclass(frozen=True)
class Examples:
    """The rows of one file, in its order."""

    first: tuple[str, ...]
    second: tuple[str, ...]  # as long as `first`, or empty where the rows have one text
    labels: tuple[str, ...]  # as long as `first`, or empty where they have none
    lines: tuple[int, ...]  # of the file
    path: pathlib.Path
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.first)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TextBatch:
    """Token ids of some texts, or of pairs of texts in one row."""

    input_ids: np.ndarray  # [B, L] int32
    attention_mask: np.ndarray  # [B, L] int32
    token_type_ids: np.ndarray  # [B, L] int32, 1 in the second text of a pair


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExampleBatch:
    """Examples with what is to be predicted of them; weight 0 is padding."""

    first: TextBatch
    second: TextBatch  # of the other side of a matching pair; [B, 0] elsewhere
    target: np.ndarray  # [B] float32: the class's row, the standardised value; 0 where there is none
    weight: np.ndarray  # [B] float32


# --- reading ------------------------------------------------------------------------------------------------------


def find_parts(folder: pathlib.Path | str) -> dict[str, pathlib.Path]:
    """Part -> file of a folder with train and dev; KgrecError where one is missing or there twice."""
    folder = pathlib.Path(folder).expanduser()
    if not folder.is_dir():
        found = "a file" if folder.exists() else "no such folder"
        raise KgrecError(f"data.path: found {found} at {folder}, expected a folder with train and dev as .jsonl, .json "
                         "or .tsv")
    out = {}
    for part in PARTS:
        files = [folder / f"{part}{suffix}" for suffix in _SUFFIXES if (folder / f"{part}{suffix}").is_file()]
        if len(files) != 1:
            names = ", ".join(f.name for f in files) or f"no {part} file"
            raise KgrecError(f"{folder}: found {names}, expected one of "
                             f"{', '.join(part + suffix for suffix in _SUFFIXES)}")
        out[part] = files[0]
    return out


def read_examples(path: pathlib.Path, task: Task) -> Examples:
    """The examples of a file. KgrecError with the line of a row that is no example of the task, or for an empty file.

    matching: a row labelled 0 is no pair; such rows are left out and counted in `notes`.
    """
    rows = list(_tsv_rows(path) if path.suffix == ".tsv" else _json_rows(path))
    if not rows:
        raise KgrecError(f"{path}: found no example, expected one a line")
    pairs = task == "matching" or (task != "simcse" and "sentence1" in rows[0][1])
    names = ("sentence1", "sentence2") if pairs else ("sentence",)
    labelled = task in ("classification", "regression")
    kept, dropped = [], 0
    for line, row in rows:
        for name in (*names, *(("label",) if labelled else ())):
            if name not in row:
                raise KgrecError(f"{path}:{line}: found no field {name!r}, expected {', '.join(names)}"
                                 f"{' and label' if labelled else ''}")
        texts = [_text(path, line, row, name) for name in names]
        label = _label(path, line, row["label"], task) if "label" in row and task != "simcse" else ""
        if task == "matching" and label in _NOT_A_PAIR:
            dropped += 1
        else:
            kept.append((line, texts, label))
    if not kept:
        raise KgrecError(f"{path}: found {dropped} rows with label 0 alone, expected pairs that belong together")
    notes = (f"{path.name}: {dropped:,} of {len(rows):,} pairs have label 0 and are left out",) if dropped else ()
    return Examples(tuple(t[0] for _, t, _ in kept), tuple(t[1] for _, t, _ in kept) if pairs else (),
                    tuple(label for _, _, label in kept) if labelled else (), tuple(n for n, _, _ in kept), path, notes)


def read_lines(path: pathlib.Path | str) -> Examples:
    """The non-empty lines of a text file as examples without labels; KgrecError where there is none or no UTF-8."""
    path = pathlib.Path(path)
    kept = [(number, line.strip()) for number, line in enumerate(lines.read_lines(path), start=1)
            if line.strip()]
    if not kept:
        raise KgrecError(f"{path}: found no text, expected one a line")
    return Examples(tuple(t for _, t in kept), (), (), tuple(n for n, _ in kept), path)


def class_names(train: Examples) -> list[str]:
    """The classes of the training labels, sorted; KgrecError where there is only one."""
    classes = sorted(set(train.labels))
    if len(classes) < 2:
        raise KgrecError(f"{train.path}: found {len(classes)} class ({', '.join(classes)}), expected two or more")
    return classes


def class_rows(examples: Examples, classes: Sequence[str]) -> np.ndarray:
    """[n] float32 rows of `classes`; KgrecError with the line of a label that is none of them."""
    rows = {name: row for row, name in enumerate(classes)}
    for line, label in zip(examples.lines, examples.labels, strict=True):
        if label not in rows:
            shown = ", ".join(classes[:8]) + (", …" if len(classes) > 8 else "")
            raise KgrecError(f"{examples.path}:{line}: found the unknown label {label!r}, expected one of train's: "
                             f"{shown}")
    return np.array([rows[label] for label in examples.labels], np.float32)


def _json_rows(path: pathlib.Path) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(lines.read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise KgrecError(f"{path}:{number}: found no JSON ({error.msg} at column {error.colno}), expected one "
                             "object a line") from None
        if not isinstance(row, dict):
            raise KgrecError(f"{path}:{number}: found a JSON {type(row).__name__}, expected an object a line")
        yield number, row


def _tsv_rows(path: pathlib.Path) -> Iterator[tuple[int, dict]]:
    header: list[str] | None = None
    for number, line in enumerate(lines.read_lines(path), start=1):
        if not line:
            continue
        cells = line.split("\t")
        if header is None:
            header = cells
        elif len(cells) != len(header):
            raise KgrecError(f"{path}:{number}: found {len(cells)} columns, expected the header's {len(header)}: "
                             f"{', '.join(header)}")
        else:
            yield number, dict(zip(header, cells, strict=True))


def _text(path: pathlib.Path, line: int, row: dict, name: str) -> str:
    value = row[name]
    if not isinstance(value, str) or not value.strip():
        raise KgrecError(f"{path}:{line}: {name}: found {value!r}, expected a text that is not empty")
    return value


def _label(path: pathlib.Path, line: int, value: object, task: Task) -> str:
    if isinstance(value, (dict, list)) or value is None or value == "":
        raise KgrecError(f"{path}:{line}: label: found {value!r}, expected a word or a number")
    if task == "regression":
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise KgrecError(f"{path}:{line}: label: found {value!r}, expected a finite number")
    return str(value)


# --- batches ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Examples as token ids: rows of one text, or of a pair in one row ([CLS] a [SEP] b [SEP])."""

    first: tuple[tuple[int, ...], ...]
    first_types: tuple[int, ...]  # where the second text of a pair begins; the row's length where there is none
    second: tuple[tuple[int, ...], ...]  # of matching; empty elsewhere
    target: np.ndarray  # [n] float32

    def __len__(self) -> int:
        return len(self.first)

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(len(row) for row in (*self.first, *self.second))


def encode(examples: Examples, task: Task, tokenizer: Tokenizer, length: int, target: np.ndarray) -> Encoded:
    """Token ids of at most `length` tokens a row; of a pair in one row the longer text is cut first."""
    if not examples.second or task == "matching":
        first = tokenizer.encode(examples.first, length)
        second = tokenizer.encode(examples.second, length) if task == "matching" else []
        starts = tuple(map(len, first))
    else:
        a, b = (tokenizer.encode(texts, length, special=False) for texts in (examples.first, examples.second))
        first, begun = [], []
        for left, right in zip(a, b, strict=True):
            room = length - 3
            keep = min(len(right), max(room // 2, room - len(left)))
            left, right = left[:room - keep], right[:keep]
            first.append([tokenizer.cls_id, *left, tokenizer.sep_id, *right, tokenizer.sep_id])
            begun.append(len(left) + 2)
        second, starts = [], tuple(begun)
    return Encoded(tuple(map(tuple, first)), starts, tuple(map(tuple, second)), target)


@dataclasses.dataclass(frozen=True)
class ExampleSource:
    """`num_steps` batches of `batch` examples, a function of (seed, step): each is seen once before any is again.

    `cover=True` is for evaluation: the batches go over the examples in order, rows past the end have weight 0.
    """

    data: Encoded
    pad_id: int
    num_steps: int
    batch: int
    length: int
    seed: tuple[int, ...]
    cover: bool = False

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> ExampleBatch:
        at = np.arange(step * self.batch, (step + 1) * self.batch)
        rows = self._cover(at) if self.cover else self._shuffled(at)
        target, weight = np.zeros(self.batch, np.float32), np.zeros(self.batch, np.float32)
        target[:len(rows)], weight[:len(rows)] = self.data.target[rows], 1
        first = self._texts([self.data.first[row] for row in rows], [self.data.first_types[row] for row in rows])
        second = [self.data.second[row] for row in rows] if self.data.second else []
        return ExampleBatch(first, self._texts(second, list(map(len, second))), target, weight)

    def _cover(self, at: np.ndarray) -> np.ndarray:
        return at[at < len(self.data)]

    def _shuffled(self, at: np.ndarray) -> np.ndarray:
        epochs, places = at // len(self.data), at % len(self.data)
        orders = {int(epoch): np.random.default_rng([*self.seed, int(epoch)]).permutation(len(self.data))
                  for epoch in np.unique(epochs)}
        return np.array([orders[int(epoch)][place] for epoch, place in zip(epochs, places, strict=True)])

    def _texts(self, ids: list, second_from: list[int]) -> TextBatch:
        out = np.full((self.batch, self.length if ids else 0), self.pad_id, np.int32)
        mask, types = np.zeros_like(out), np.zeros_like(out)
        for row, (tokens, start) in enumerate(zip(ids, second_from, strict=True)):
            out[row, :len(tokens)], mask[row, :len(tokens)] = tokens, 1
            types[row, start:len(tokens)] = 1
        return TextBatch(out, mask, types)
