"""Tables on disk: `.tsv` without quoting, `.csv` (RFC 4180) and `.parquet`, read with explicit types at speed.

The fast path leaves parsing to pyarrow. Only when something is wrong is the file walked a second time, line by line, to
say where: pyarrow's own messages carry no line.
"""

from __future__ import annotations

import csv
import dataclasses
import os
import pathlib
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from kgrec_jax.data.lines import encoding_error
from kgrec_jax.errors import KgrecError

Kind = Literal["id", "text", "float", "int"]
SUFFIXES = (".tsv", ".csv", ".parquet")


@dataclasses.dataclass(frozen=True)
class Coded:
    """A column of identifiers: each row an index into its distinct values, in the order of first appearance."""

    codes: np.ndarray  # [n] int32
    values: list[str]

    def __len__(self) -> int:
        return len(self.codes)

    def strings(self) -> list[str]:
        """The column itself."""
        return pa.DictionaryArray.from_arrays(pa.array(self.codes), pa.array(self.values, pa.string())).to_pylist()

    def strangers(self, known: Container[str]) -> tuple[list[str], int]:
        """(the values that are not known, the first row with the first of them; -1 without any)."""
        unknown = [n for n, value in enumerate(self.values) if value not in known]
        row = int(np.argmax(self.codes == unknown[0])) if unknown else -1
        return [self.values[n] for n in unknown], row


@dataclasses.dataclass(frozen=True)
class Table:
    """Columns of one file: `id` -> Coded, `text` -> list of str, `float` -> float64, `int` -> int64."""

    path: pathlib.Path
    columns: Mapping[str, Coded | list[str] | np.ndarray]
    num_rows: int
    ignored: tuple[str, ...]  # columns of the file that nobody asked for

    def __contains__(self, column: str) -> bool:
        return column in self.columns

    def __getitem__(self, column: str) -> Coded | list[str] | np.ndarray:
        return self.columns[column]

    def where(self, row: int) -> str:
        """FILE:LINE of a row, for messages."""
        return _where(self.path, row)


def find_table(folder: pathlib.Path, stem: str) -> pathlib.Path | None:
    """The file of that name in whichever format it is, None without one; an error where there are two."""
    found = [folder / f"{stem}{suffix}" for suffix in SUFFIXES if (folder / f"{stem}{suffix}").is_file()]
    if len(found) > 1:
        names = " and ".join(p.name for p in found)
        raise KgrecError(f"{folder}: found both {names}, expected one of them; move the other one away")
    return found[0] if found else None


def read_table(path: pathlib.Path, required: Mapping[str, Kind], optional: Mapping[str, Kind] | None = None,
               rest_as_text: bool = False) -> Table:
    """Read the named columns; with `rest_as_text` all other columns too.

    Errors name file and line: missing or doubled columns, rows of another width, bytes that are not UTF-8,
    identifiers that are empty, numbers that are not finite, files without rows.
    """
    path = pathlib.Path(path)
    header = read_header(path)
    doubled = sorted({c for c in header if header.count(c) > 1})
    if doubled:
        raise KgrecError(f"{path}:1: found the column {doubled[0]} twice, expected each once; rename one of them")
    missing = [c for c in required if c not in header]
    if missing:
        hint = "; RecBole's files are read by kgrec data import recbole" if any(":" in c for c in header) else ""
        raise KgrecError(f"{path}:1: found the columns {', '.join(header)}, expected {', '.join(required)} "
                         f"(missing: {', '.join(missing)}); rename the columns, or use kgrec data import csv{hint}")
    kinds = {c: k for c, k in {**required, **(optional or {})}.items() if c in header}
    if rest_as_text:
        kinds |= {c: "text" for c in header if c not in kinds}
    table = _read_parquet(path, kinds) if path.suffix == ".parquet" else _read_delimited(path, header, kinds)
    if table.num_rows == 0:
        raise KgrecError(f"{path}: found a header and no rows, expected at least one; remove the file if there is "
                         "nothing to say")
    columns = {name: _to_numpy(path, name, kind, table.column(name)) for name, kind in kinds.items()}
    return Table(path, columns, table.num_rows, tuple(c for c in header if c not in kinds))


def write_tsv(path: pathlib.Path, columns: Mapping[str, Coded | Sequence[str] | np.ndarray]) -> None:
    """Write columns as `.tsv`; tabs and line ends inside a value become one space. Appears complete or not at all."""
    lengths = {len(column) for column in columns.values()}
    if len(lengths) > 1:
        raise ValueError(f"{path}: columns of the lengths {sorted(lengths)}, expected one")
    parts = [_parts(column) for column in columns.values()]
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    with open(temporary, "w", encoding="utf-8", newline="\n") as file:
        file.write("\t".join(columns) + "\n")
        for start in range(0, max(lengths, default=0), 1 << 18):  # no column of text of millions of rows at once
            rows = pc.binary_join_element_wise(*(part(slice(start, start + (1 << 18))) for part in parts), "\t")
            file.write("\n".join(rows.to_pylist()) + "\n")
    os.replace(temporary, path)


def cell(value: object) -> str:
    """A value as a cell of a table that people read: a float in six digits."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _parts(column: Coded | Sequence[str] | np.ndarray) -> Callable[[slice], pa.Array]:
    """Rows -> text of them."""
    if isinstance(column, Coded):
        values = _to_arrow(column.values)
        return lambda rows: values.take(pa.array(column.codes[rows]))
    return lambda rows: _to_arrow(column[rows])


def _to_arrow(column: Sequence[str] | np.ndarray) -> pa.Array:
    if isinstance(column, np.ndarray) and column.dtype.kind in "iuf":
        return pa.array(column).cast(pa.string())
    array = pa.array(column, pa.string())
    return pc.replace_substring_regex(array, r"[\t\r\n]+", " ")


def read_header(path: pathlib.Path) -> list[str]:
    """Column names; also where missing and empty files and foreign encodings are told apart."""
    if not path.is_file():
        raise KgrecError(f"{path}: found no such file, expected a table; check the path")
    if path.stat().st_size == 0:
        raise KgrecError(f"{path}: found an empty file, expected a header and rows; remove it if there is nothing to "
                         "say")
    if path.suffix == ".parquet":
        try:
            return list(pa.parquet.read_schema(path).names)
        except (pa.ArrowInvalid, OSError) as error:
            raise KgrecError(f"{path}: found something that is not Parquet ({_first_line(error)}), expected a Parquet "
                             "file") from None
    with open(path, "rb") as file:
        start = file.read(4)
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise KgrecError(f"{path}:1: found UTF-16, expected UTF-8; convert it: iconv -f UTF-16 -t UTF-8 {path.name}")
    first = next(_lines(path), (1, []))[1]
    bad = next((c for c in first if _is_invalid(c)), None)
    if bad is not None:
        raise encoding_error(path, 1)
    if not any(first):
        raise KgrecError(f"{path}:1: found an empty line, expected the names of the columns")
    return first


def _read_delimited(path: pathlib.Path, header: list[str], kinds: Mapping[str, Kind]) -> pa.Table:
    quoted = path.suffix == ".csv"
    parse = pa.csv.ParseOptions(delimiter="," if quoted else "\t", quote_char='"' if quoted else False,
                                double_quote=quoted, escape_char=False, newlines_in_values=quoted)
    read = pa.csv.ReadOptions(block_size=1 << 24)
    if quoted:
        _check_quotes(path)
    types = {"id": pa.dictionary(pa.int32(), pa.string()), "text": pa.string(), "float": pa.float64()}
    for int_type in (pa.int64(), pa.float64()):  # some tools write timestamps as 881250949.0
        wanted = {c: int_type if k == "int" else types[k] for c, k in kinds.items()}
        convert = pa.csv.ConvertOptions(column_types=wanted, include_columns=list(kinds), strings_can_be_null=False)
        try:
            return pa.csv.read_csv(path, read, parse, convert)
        except (pa.ArrowInvalid, pa.ArrowKeyError) as error:
            message = _first_line(error)
    raise _diagnose(path, header, kinds, message)


def _read_parquet(path: pathlib.Path, kinds: Mapping[str, Kind]) -> pa.Table:
    try:
        table = pa.parquet.read_table(path, columns=list(kinds), partitioning=None)
    except (pa.ArrowInvalid, OSError) as error:
        raise KgrecError(f"{path}: found damaged Parquet ({_first_line(error)}), expected a readable file; write it "
                         "again") from None
    columns = {c: _cast(path, c, kind, table.column(c)) for c, kind in kinds.items()}
    return pa.table(columns)


def _cast(path: pathlib.Path, name: str, kind: Kind, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A Parquet column in the type that the same column of a text file would have."""
    kind_type = {"id": pa.string(), "text": pa.string(), "float": pa.float64(), "int": pa.int64()}[kind]
    source = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if kind == "id" and not (pa.types.is_integer(source) or _is_string(source)):
        raise KgrecError(f"{path}: found the column {name} as {source}, expected strings or integers; ids are never "
                         "fractions")
    try:
        if pa.types.is_dictionary(column.type):
            column = column.cast(source)
        if pa.types.is_list(source) or pa.types.is_large_list(source):
            # null elements do not occur in practice; a null list is an empty text
            joined = [pc.binary_join(chunk.cast(pa.list_(pa.string())), ", ") for chunk in column.chunks]
            return pa.chunked_array(joined, pa.string())
        if pa.types.is_timestamp(source):
            column = column.cast(pa.timestamp("s"), safe=False).cast(pa.int64())
        elif kind == "int" and pa.types.is_floating(source):
            column = pc.floor(column)
        column = column.cast(kind_type)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise KgrecError(f"{path}: found the column {name} as {source}, expected {_EXPECTED[kind]} "
                         f"({_first_line(error)})") from None
    return column.dictionary_encode() if kind == "id" else column


def _is_string(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


_EXPECTED = {"id": "an identifier", "text": "UTF-8 text", "float": "a finite number", "int": "a whole number (seconds)"}


def _to_numpy(path: pathlib.Path, name: str, kind: Kind, column: pa.ChunkedArray) -> Coded | list[str] | np.ndarray:
    if kind == "text":
        return ["" if v is None else v for v in column.to_pylist()]
    if kind == "id":
        chunks = column.unify_dictionaries().chunks
        if column.null_count:
            raise _cell_error(path, int(np.argmax(column.is_null().to_numpy())), name, "an empty cell", kind)
        codes = np.concatenate([c.indices.to_numpy() for c in chunks]).astype(np.int32, copy=False)
        values = chunks[0].dictionary.to_pylist()
        if "" in values:
            raise _cell_error(path, int(np.argmax(codes == values.index(""))), name, "an empty cell", kind)
        return Coded(codes, values)
    # An empty cell, "nan" and "NA" come out as null, which to_numpy turns into NaN.
    array = column.to_numpy() if not column.null_count else column.cast(pa.float64()).to_numpy()
    bad = ~np.isfinite(array) if array.dtype.kind == "f" else np.zeros(0, bool)
    if bad.any():
        row = int(np.argmax(bad))
        found = "an empty cell or NaN" if np.isnan(array[row]) else "an infinite number"
        raise _cell_error(path, row, name, found, kind)
    if kind == "int" and array.dtype != np.int64:
        large = np.abs(array) >= 2.0**63
        if large.any():
            row = int(np.argmax(large))
            raise _cell_error(path, row, name, f"{array[row]:g}, which is too large,", kind)
        return np.floor(array).astype(np.int64)
    if kind == "int":
        return array
    return array.astype(np.float64, copy=False)


def _cell_error(path: pathlib.Path, row: int, name: str, found: str, kind: Kind) -> KgrecError:
    return KgrecError(f"{_where(path, row)}: found {found} in the column {name}, expected {_EXPECTED[kind]}; correct "
                      "or remove the row")


def _check_quotes(path: pathlib.Path) -> None:
    """An error where a quote is never closed: pyarrow takes the rest of the file for one value without a word."""
    with open(path, "rb") as file:
        count = sum(block.count(b'"') for block in iter(lambda: file.read(1 << 24), b""))
    if count % 2:
        for _ in _lines(path, strict=True):
            pass


def _lines(path: pathlib.Path, strict: bool = False) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of every line, the header's first; invalid bytes come out as lone surrogates.

    `strict` makes an error of a quoted value without end.
    """
    newline = "" if path.suffix == ".csv" else None
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline=newline) as file:
        if path.suffix == ".csv":
            reader, line = csv.reader(file, strict=strict), 1
            try:
                for fields in reader:
                    yield line, fields
                    line = reader.line_num + 1
            except csv.Error:  # a quote that is never closed swallows lines up to the end or to the reader's limit
                raise KgrecError(f"{path}:{line}: found a value that does not end, expected a closing quote; "
                                 f"check the quotes") from None
        else:
            for number, text in enumerate(file, 1):
                yield number, text.rstrip("\n").split("\t")


def _is_invalid(text: str) -> bool:
    return any("\udc80" <= c <= "\udcff" for c in text)


def _where(path: pathlib.Path, row: int) -> str:
    """FILE:LINE of data row `row`; blank lines are no rows."""
    if path.suffix == ".parquet":
        return f"{path}: row {row + 1}"
    seen = -1  # the header
    for line, fields in _lines(path):
        if fields not in ([], [""]):
            if seen == row:
                return f"{path}:{line}"
            seen += 1
    return f"{path}:{row + 2}"


def _diagnose(path: pathlib.Path, header: list[str], kinds: Mapping[str, Kind], message: str) -> KgrecError:
    """The first line that explains why pyarrow refused the file."""
    number = {i: c for i, c in enumerate(header) if kinds.get(c) in ("float", "int")}
    for line, fields in _lines(path):
        if line == 1 or fields in ([], [""]):
            continue
        if any(_is_invalid(f) for f in fields):
            return encoding_error(path, line)
        if len(fields) != len(header):
            what = "the quotes around a value" if path.suffix == ".csv" else "tabs inside a value"
            return KgrecError(f"{path}:{line}: found {len(fields)} field{'s' * (len(fields) != 1)}, expected "
                              f"{len(header)} ({', '.join(header)}); check {what}")
        for index, name in number.items():
            if not _is_number(fields[index] or "nan"):
                return KgrecError(f"{path}:{line}: found {fields[index]!r} in the column {name}, "
                                  f"expected {_EXPECTED[kinds[name]]}; correct or remove the row")
    return KgrecError(f"{path}: found a table that cannot be read ({message}), expected columns {', '.join(header)}")


def _is_number(text: str) -> bool:
    """Whether pyarrow reads it as one: Python alone also takes 1_000 and the digits of other scripts."""
    try:
        float(text)
    except ValueError:
        return False
    return text.isascii() and "_" not in text


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0]
