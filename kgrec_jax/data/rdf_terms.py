"""RDF files as a stream of statements.

A statement is one string in N-Triples' own form, `<head> <relation> <tail>` without the full stop: terms are told apart
by their first character, and an IRI holds neither a space nor a bracket. One string is the fastest thing that crosses
from the parser to Python.
"""

from __future__ import annotations

import bz2
import dataclasses
import gzip
import itertools
import pathlib
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import IO
from xml.parsers import expat

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kgrec_jax.errors import KgrecError

FORMATS = {".ttl": "TURTLE", ".nt": "N_TRIPLES", ".nq": "N_QUADS", ".trig": "TRIG", ".rdf": "RDF_XML",
           ".owl": "RDF_XML"}
_BATCH = 1 << 15  # statements at a time: the lists of a larger one fall out of the processor's cache


@dataclasses.dataclass(frozen=True)
class Piece:
    """A file, or the bytes [start, stop) of an N-Triples file, to be parsed."""

    path: pathlib.Path
    index: int  # of the file among those read: blank nodes are unique a file
    start: int = 0
    stop: int = -1  # -1: to the end


def format_of(path: pathlib.Path) -> str:
    """The name of the format in pyoxigraph, by the file's suffix below .gz or .bz2; "" for what is no RDF."""
    return FORMATS.get(pathlib.Path(path.name.removesuffix(".gz").removesuffix(".bz2")).suffix, "")


def pieces(paths: Sequence[pathlib.Path], parts: int, at_least: int = 1 << 24) -> list[Piece]:
    """The files, N-Triples cut at line ends into at most `parts` pieces of `at_least` bytes each.

    Raises KgrecError for a file that is absent or whose suffix is of no RDF format.
    """
    out: list[Piece] = []
    for index, path in enumerate(paths):
        if not path.is_file():
            raise KgrecError(f"{path}: found no such file, expected RDF; check the path")
        if not format_of(path):
            raise KgrecError(f"{path}: found the suffix {path.suffix or 'none'}, expected one of {', '.join(FORMATS)}, "
                             "perhaps followed by .gz or .bz2; rename the file by its format")
        size = path.stat().st_size
        if path.suffix != ".nt" or size < 2 * at_least or parts < 2:
            out.append(Piece(path, index))
            continue
        cuts, count = [0], min(parts, size // at_least)
        with open(path, "rb") as file:
            for k in range(1, count):
                file.seek(size * k // count)
                file.readline()
                if cuts[-1] < file.tell() < size:
                    cuts.append(file.tell())
        out += [Piece(path, index, a, b) for a, b in itertools.pairwise([*cuts, size])]
    return out


class _Range:
    """A reader of the bytes [start, stop) of a file; `told` hears how many were read since the last time."""

    def __init__(self, file: IO[bytes], raw: IO[bytes], start: int, stop: int, told: Callable[[int], None] | None):
        self._file, self._raw, self._left, self._told, self._last = file, raw, stop - start, told, start
        if start:
            file.seek(start)

    def read(self, size: int = -1) -> bytes:
        """As a file's."""
        if self._left >= 0:
            size = self._left if size < 0 else min(size, self._left)
        block = self._file.read(size)
        if self._left >= 0:
            self._left -= len(block)
        if self._told:
            now = self._raw.tell()  # of the file on disk: the size of its content is not known before its end
            self._told(now - self._last)
            self._last = now
        return block


def statements(piece: Piece, told: Callable[[int], None] | None = None) -> Iterator[list[str]]:
    """Batches of statements in memory that does not depend on the file; `told` gets the bytes as they are read.

    Graph names of quads are dropped. Raises KgrecError with file, line and column for malformed RDF, an unknown prefix
    and a damaged archive.
    """
    import pyoxigraph

    name = format_of(piece.path)
    if piece.path.stat().st_size == 0:
        return
    with open(piece.path, "rb") as raw, unpacked(piece.path, raw) as file:
        reader = _Range(file, raw, piece.start, piece.stop if piece.stop >= 0 else piece.start - 1, told)
        try:
            parsed = pyoxigraph.parse(reader, format=getattr(pyoxigraph.RdfFormat, name))
            if name in ("N_QUADS", "TRIG"):
                lines = (f"{q.subject} {q.predicate} {q.object}" for q in parsed)
            else:
                lines = map(str, parsed)
            while batch := list(itertools.islice(lines, _BATCH)):
                yield batch
        except SyntaxError as error:
            raise _located(piece, name, error) from None
        except (EOFError, OSError, ValueError, zlib.error) as error:
            raise KgrecError(f"{piece.path}: found a file that cannot be read to its end ({_one_line(error)}), "
                             f"expected whole {_said(name)}; fetch or write it again") from None


def unpacked(path: pathlib.Path, raw: IO[bytes]) -> IO[bytes]:
    """The content of an opened file: of a .gz or .bz2 what is in it."""
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    return bz2.BZ2File(raw) if path.suffix == ".bz2" else raw


def _said(name: str) -> str:
    return {"TURTLE": "Turtle", "TRIG": "TriG", "RDF_XML": "RDF/XML"}.get(name, name.title().replace("_", "-"))


def _one_line(error: object) -> str:
    return " ".join(str(error).split())


def _located(piece: Piece, name: str, error: SyntaxError) -> KgrecError:
    """FILE:LINE:COLUMN of what the parser stumbled over."""
    found = re.sub(r"^Parser error .*?column.*?: (?=\S)|^Parser error:? ?|\s*\(line \d+\)$", "", _one_line(error))
    line, column = error.lineno, error.offset
    if line and piece.start:
        with open(piece.path, "rb") as file:
            line += _lines_before(file, piece.start)
    if not line and name == "RDF_XML":
        line, column, found = _xml_position(piece.path, found)
    if line and line > 1 and "line jumps" in found:  # the parser is at the next line when it misses the end of this one
        line -= 1
        with open(piece.path, "rb") as raw, unpacked(piece.path, raw) as file:
            text = next(itertools.islice(file, line - 1, line), b"")
        column = len(text.rstrip(b"\r\n").decode("utf-8", "replace")) + 1
    place = f"{piece.path}:{line}:{column or 1}" if line else f"{piece.path}"
    hint = "declare it" if "prefix" in found.lower() else "correct the line"
    if "No scheme" in found:
        hint = "write the whole IRI or declare a base"
    return KgrecError(f"{place}: found malformed RDF ({found}), expected {_said(name)}; {hint}")


def _lines_before(file: IO[bytes], stop: int) -> int:
    lines = 0
    while stop > 0 and (block := file.read(min(1 << 22, stop))):
        lines, stop = lines + block.count(b"\n"), stop - len(block)
    return lines


def _xml_position(path: pathlib.Path, found: str) -> tuple[int, int, str]:
    """(line, column, what) of an error in XML by a second parser, for the first one does not always tell where."""
    parser = expat.ParserCreate(namespace_separator=" ")
    with open(path, "rb") as raw, unpacked(path, raw) as file:
        try:
            parser.ParseFile(file)
        except expat.ExpatError as error:
            return error.lineno, error.offset + 1, found
    return 0, 0, found


def coded(batch: list[str]) -> tuple[np.ndarray, list[str], np.ndarray, bool]:
    """([n, 3] int32 statements as rows of terms, the batch's distinct terms, [D] whether each is a literal, whether
    any is a blank node or a statement).

    Splitting and hashing in Arrow takes a sixth of what a loop over the strings does.
    """
    parts = pc.split_pattern(pa.array(batch, pa.string()), " ", max_splits=2).flatten().dictionary_encode()
    literal = pc.starts_with(parts.dictionary, '"').to_numpy(zero_copy_only=False)
    iri = pc.starts_with(parts.dictionary, "<h").to_numpy(zero_copy_only=False)  # the usual case, without a loop
    terms = parts.dictionary.to_pylist()
    odd = any(terms[k][0] == "_" or terms[k].startswith("<<") for k in np.flatnonzero(~(iri | literal)).tolist())
    return parts.indices.to_numpy().reshape(-1, 3), terms, literal, odd


class BlankNodes:
    """Names blank nodes so that no two files share one, and the same way at every reading.

    The parser draws ids for nodes that Turtle and RDF/XML leave without a label, so theirs are numbered by their first
    appearance; labels in N-Triples and N-Quads stay, and need no memory.
    """

    def __init__(self, piece: Piece):
        self._prefix = f"_:f{piece.index}"
        self._rows: dict[str, int] | None = {} if format_of(piece.path) not in ("N_TRIPLES", "N_QUADS") else None

    def __call__(self, term: str) -> str:
        """The name of a blank node; any other term as it is."""
        if term[0] != "_":
            return term
        if self._rows is None:
            return f"{self._prefix}.{term[2:]}"
        return f"{self._prefix}b{self._rows.setdefault(term, len(self._rows))}"


def bare(term: str) -> str:
    """The id of a term: an IRI without its brackets, a blank node as it is."""
    return term[1:-1] if term[0] == "<" else term
