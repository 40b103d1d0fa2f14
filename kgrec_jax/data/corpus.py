"""A corpus as a stream of documents, out of folders and files of many kinds; memory holds one document at a time.

    .txt              blocks between blank lines where there are any in the beginning, else one document a line
    .jsonl .ndjson    one object a line, its field `text`
    .tsv .csv .parquet    the column `text`, else a row's title or name with its description, abstract …
    wiki_00 …         what Wikipedia extractors write: JSON lines or <doc …> blocks
    a dataset folder  its items and entities tables; any other folder: all such files below it, in order of their paths

Each may be compressed (.gz .zst .bz2 .xz), tables but for Parquet too. A file of any other name is looked into if it
is named itself.
"""

from __future__ import annotations

import bz2
import csv
import dataclasses
import gzip
import io
import itertools
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet

from kgrec_jax.data.tables import find_table
from kgrec_jax.data.texts import separator
from kgrec_jax.data.lines import encoding_error
from kgrec_jax.errors import KgrecError

KINDS = {".txt": "text", ".text": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".tsv": "tsv", ".csv": "csv",
         ".parquet": "parquet"}
PACKED = (".gz", ".zst", ".bz2", ".xz")
NAMES = ("title", "name")  # what a text is about
TEXTS = ("description", "text", "abstract", "summary", "overview", "body", "llm_text")
MAX_LINE = 1 << 26  # bytes; a longer line is no document but a file without line ends
_PEEK = 1 << 20  # bytes of a .txt in which a blank line is looked for
_WIKI = re.compile(r"wiki_\d+")


@dataclasses.dataclass(frozen=True)
class CorpusFile:
    """One file of a corpus."""

    path: Path
    kind: str  # a value of KINDS, or "any": its beginning tells
    size: int  # bytes on disk


def find_files(paths: Sequence[str], say: Callable[[str], None] = lambda line: None) -> tuple[CorpusFile, ...]:
    """The files of a corpus, in the order of `paths`; `say` is told how many files of a folder hold no texts.

    Raises KgrecError for a path that does not exist, and where there is no file with texts at all.
    """
    found: list[CorpusFile] = []
    for name in paths:
        path = Path(name).expanduser()
        if path.is_dir():
            some, others = _in_folder(path)
            found += some
            if others:
                more = "" if len(others) == 1 else f" and {len(others) - 1:,} more files"
                say(f"note: {path}: {others[0].path.name}{more} left out, no texts by name or columns")
        elif path.is_file():
            found.append(_file(path, "any"))
        else:
            raise KgrecError(f"pretrain.corpus: found no file or folder {name}, expected one; check the path")
    if not found:
        raise KgrecError(f"pretrain.corpus: found no file with texts in {', '.join(map(str, paths))}, expected "
                         f"{', '.join(KINDS)} (also {', '.join(PACKED)}), wiki_00 … or the tables of a data set")
    return tuple({file.path.resolve(): file for file in found}.values())


def documents(files: Sequence[CorpusFile]) -> Iterator[tuple[str, int]]:
    """(text, bytes of the files read so far) of every document that says anything, in order.

    Raises KgrecError with file and line for bytes that are not UTF-8, damaged compression, lines that are no JSON
    object with a text, tables without a text column, and at the end where there was no document at all.
    """
    before, number = 0, 0
    for file in files:
        for text, position in _of_file(file):
            if text and not text.isspace():
                number += 1
                yield text, before + min(position, file.size)
        before += file.size
    if not number:
        named = f"{files[0].path}" + (f" and {len(files) - 1} more files" if len(files) > 1 else "") if files else "it"
        raise KgrecError(f"pretrain.corpus: found no text in {named}, expected at least one document")


def _file(path: Path, otherwise: str) -> CorpusFile:
    bare = path.with_suffix("") if path.suffix in PACKED else path
    kind = KINDS.get(bare.suffix.lower(), "any" if _WIKI.fullmatch(bare.name) else otherwise)
    if kind == "parquet" and bare != path:
        raise KgrecError(f"{path}: found compressed Parquet, expected .parquet (compressed in itself); unpack it")
    return CorpusFile(path, kind, path.stat().st_size)


def _in_folder(folder: Path) -> tuple[list[CorpusFile], list[CorpusFile]]:
    """(files with texts, other files) below a folder; of a data set only items and entities are looked at."""
    tables = [find_table(folder, stem) for stem in ("items", "entities")]
    if any(tables):
        files = [_file(table, "") for table in tables if table]
        return [file for file in files if _tells(file)], []
    paths = sorted(path for path in folder.rglob("*")
                   if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts))
    files = [_file(path, "") for path in paths]
    told = [bool(file.kind) and _tells(file) for file in files]
    return [f for f, t in zip(files, told, strict=True) if t], [f for f, t in zip(files, told, strict=True) if not t]


def _tells(file: CorpusFile) -> bool:
    """Whether a table has a column that tells something; other files have no columns."""
    if file.kind == "parquet":
        return bool(_columns(_parquet(file.path).schema_arrow.names)[1])
    if file.kind not in ("tsv", "csv"):
        return True
    first = next((line for _, line, _ in _lines(file.path)), "")
    return bool(_columns(next(csv.reader([first]), []) if file.kind == "csv" else first.split("\t"))[1])


def _of_file(file: CorpusFile) -> Iterator[tuple[str, int]]:
    """(text, bytes read) of each document of one file."""
    if file.kind == "parquet":
        return _of_parquet(file)
    lines, kind = _lines(file.path), file.kind
    if kind == "any":
        first = next((text for _, text, _ in _lines(file.path) if text.strip()), "").lstrip()
        kind = "doc" if first.startswith("<doc ") else "jsonl" if first.startswith("{") else "text"
    readers = {"text": _of_text, "jsonl": _of_jsonl, "doc": _of_doc, "tsv": _of_table, "csv": _of_table}
    return readers[kind](file, lines)


def _of_text(file: CorpusFile, lines: Iterator[tuple[int, str, int]]) -> Iterator[tuple[str, int]]:
    head, size = [], 0
    for line in lines:
        head.append(line)
        size += len(line[1])
        if size > _PEEK:
            break
    said = [bool(text.strip()) for _, text, _ in head]
    first = said.index(True) if any(said) else 0
    blocks = not all(said[first : len(said) - said[::-1].index(True)]) if any(said) else False
    held: list[str] = []
    position = 0
    for _, text, position in itertools.chain(head, lines):
        if not blocks:
            yield text.strip(), position
        elif text.strip():
            held.append(text.strip())
        elif held:
            yield "\n".join(held), position
            held = []
    yield "\n".join(held), position


def _of_jsonl(file: CorpusFile, lines: Iterator[tuple[int, str, int]]) -> Iterator[tuple[str, int]]:
    for number, text, position in lines:
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise KgrecError(f"{file.path}:{number}: found no JSON ({error.msg}), expected one object a line") from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            has = f"the fields {', '.join(map(str, row))}" if isinstance(row, dict) else f"a {type(row).__name__}"
            raise KgrecError(f"{file.path}:{number}: found {has}, expected an object with a string `text`")
        yield row["text"].strip(), position


def _of_doc(file: CorpusFile, lines: Iterator[tuple[int, str, int]]) -> Iterator[tuple[str, int]]:
    held: list[str] | None = None
    number = 1
    for number, text, position in lines:
        start = text.lstrip()
        if start.startswith("<doc ") and held is None:
            held = []
        elif start.startswith("</doc>") and held is not None:
            yield "\n".join(held), position
            held = None
        elif text.strip():
            if held is None:
                raise KgrecError(f"{file.path}:{number}: found text outside <doc …> … </doc>, expected it inside")
            held.append(text.strip())
    if held is not None:
        raise KgrecError(f"{file.path}:{number}: found the end of the file inside <doc …>, expected </doc>; the file "
                         "was cut, write it again")


def _columns(header: Sequence[str]) -> tuple[list[int], list[int]]:
    """(columns that name, columns that tell) of a table; a column `text` alone suffices."""
    if "text" in header:
        return [], [header.index("text")]
    return ([header.index(n) for n in NAMES if n in header], [header.index(n) for n in TEXTS if n in header])


def _row(values: Sequence[str], names: Sequence[int], texts: Sequence[int]) -> str:
    """One text of a row; "" where there is only a name. A text that begins with the name has no need of it."""
    text = ""
    for at in texts:
        value = (values[at] or "").strip()
        text += (separator(text) if text and value else "") + value
    for at in reversed(names):
        name = (values[at] or "").strip()
        if text and name and not text.lower().startswith(name.lower()):
            text = name + separator(name) + text
    return text


def _chosen(file: CorpusFile, header: list[str]) -> tuple[list[int], list[int]]:
    names, texts = _columns(header)
    if not names and not texts:
        raise KgrecError(f"{file.path}:1: found the columns {', '.join(header)}, expected `text` or one of "
                         f"{', '.join((*NAMES, *TEXTS))}; rename the column that holds the texts")
    return (names, texts) if texts else ([], names)


def _of_table(file: CorpusFile, lines: Iterator[tuple[int, str, int]]) -> Iterator[tuple[str, int]]:
    at = [0, 0]  # line and position

    def fed() -> Iterator[str]:
        for at[0], text, at[1] in lines:
            yield text

    rows = csv.reader((t + "\n" for t in fed()), strict=True) if file.kind == "csv" else (t.split("\t") for t in fed())
    try:
        header = next(rows, [])
        names, texts = _chosen(file, header)
        for values in rows:
            if values and values != [""]:
                if len(values) != len(header):
                    raise KgrecError(f"{file.path}:{at[0]}: found {len(values)} columns, expected {len(header)}")
                yield _row(values, names, texts), at[1]
    except csv.Error as error:
        raise KgrecError(f"{file.path}:{at[0]}: found no CSV ({error}), expected RFC 4180 with quotes") from None


def _parquet(path: Path) -> pa.parquet.ParquetFile:
    try:
        return pa.parquet.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        said = str(error).splitlines()[0]
        raise KgrecError(f"{path}: found something that is not Parquet ({said}), expected a Parquet file") from None


def _of_parquet(file: CorpusFile) -> Iterator[tuple[str, int]]:
    held = _parquet(file.path)
    header = held.schema_arrow.names
    names, texts = _chosen(file, header)
    columns = [header[at] for at in (*names, *texts)]
    for column in columns:
        kind = held.schema_arrow.field(column).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise KgrecError(f"{file.path}: {column}: found a column of type {kind}, expected strings")
    done, total = 0, max(held.metadata.num_rows, 1)
    try:
        for batch in held.iter_batches(1024, columns=columns):
            for values in zip(*(batch.column(name).to_pylist() for name in columns), strict=True):
                done += 1
                row = _row(values, range(len(names)), range(len(names), len(columns)))
                yield row, file.size * done // total
    except (pa.ArrowException, OSError) as error:
        said = str(error).splitlines()[0]
        raise KgrecError(f"{file.path}:{done + 1}: found damaged Parquet ({said}), expected whole row groups; fetch or "
                         "write it again") from None


def _unpacked(raw: BinaryIO, suffix: str) -> Iterable[bytes]:
    openers = {".gz": lambda: gzip.GzipFile(fileobj=raw), ".bz2": lambda: bz2.BZ2File(raw),
               ".xz": lambda: lzma.LZMAFile(raw),
               ".zst": lambda: io.BufferedReader(pa.CompressedInputStream(raw, "zstd"))}
    return openers[suffix]() if suffix in openers else raw


def _lines(path: Path) -> Iterator[tuple[int, str, int]]:
    """(number from 1, text without its end, bytes of the file read) of each line."""
    number = 0
    with open(path, "rb") as raw:
        try:
            stream = _unpacked(raw, path.suffix)
            while data := stream.readline(MAX_LINE):
                number += 1
                if len(data) == MAX_LINE:
                    raise KgrecError(f"{path}:{number}: found a line of more than {MAX_LINE >> 20} MB, expected one "
                                     "document a line; break it into lines")
                yield number, data.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n"), raw.tell()
        except UnicodeDecodeError:
            raise encoding_error(path, number) from None
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            if path.suffix not in PACKED:
                raise
            said = (str(error).splitlines() or [type(error).__name__])[0]
            raise KgrecError(f"{path}:{number + 1}: found damaged {path.suffix} data ({said}), expected a whole file; "
                             "fetch or write it again") from None
