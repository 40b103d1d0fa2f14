"""Frozen dataclasses as a folder of plain files: JSON for the structure and long lists, `.npy` for the arrays.

Nothing in such a folder is code, so a folder from anybody can be read. What may appear is given (`classes`); any other
class is an error. Large arrays are mapped into memory and read where they are touched, so that opening a folder
takes no longer for a large catalogue.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import pathlib
import re
import shutil
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import scipy.sparse as sp

from kgrec_jax.errors import KgrecError

MANIFEST = "recommender.json"
FORMAT = "kgrec recommender"
FORMAT_VERSION = 2  # 1 was a pickle
_MAPPED = 1 << 20  # bytes from which a dense array is mapped and not read
_LONG = 50  # entries from which a tuple of strings or a table of numbers gets a file of its own
_AGAIN = "copy the folder again, or make it anew with kgrec run (kgrec refit) in a new folder"
_CSR = ("data", "indices", "indptr")


@dataclasses.dataclass(frozen=True)
class Files:
    """Files that are kept as they are: saving copies them, and after loading `folder` is that of the copies."""

    folder: pathlib.Path
    names: tuple[str, ...]


def save(folder: pathlib.Path, value: Any, classes: Iterable[type], about: Mapping[str, Any]) -> None:
    """Writes a dataclass in place of what `folder` holds, which stays until the new one is complete.

    `value` is made of dataclasses among `classes`, arrays (NumPy or JAX), CSR matrices, numbers, strings, None,
    `Files`, tuples and mappings from strings; anything else is a TypeError. `about` is for people who open the JSON.
    """
    temporary, aside = (folder.with_name(f".{folder.name}.{word}") for word in ("tmp", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        content = _Writer(temporary, {c.__name__ for c in classes}).node(value, "")
        manifest = {"format": FORMAT, "format_version": FORMAT_VERSION, "about": dict(about), "content": content}
        _write_json(temporary / MANIFEST, manifest, indent=1)
        if folder.exists():
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
        temporary.rename(folder)
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load(folder: pathlib.Path, classes: Iterable[type]) -> Any:
    """What `save` wrote. A KgrecError names the file that is missing, cut short, foreign or of another version."""
    aside = folder.with_name(f".{folder.name}.old")
    if not folder.is_dir() and aside.is_dir():  # killed between two renames: the old one is still whole
        folder = aside
    file = folder / MANIFEST
    if not file.is_file():
        old = " but one of format version 1 (recommender.pkl)" if (folder / "recommender.pkl").is_file() else ""
        raise KgrecError(f"{folder}: found no {MANIFEST}{old}, expected the recommender of a finished run; "
                         "finish it with kgrec run, in a new folder where it is of an older version")
    manifest = _read_json(file)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise KgrecError(f"{file}: found no `format: {FORMAT}`, expected a recommender; give the folder of a run")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise KgrecError(f"{file}: found format version {manifest.get('format_version')}, expected {FORMAT_VERSION}; "
                         "run it again in a new folder, or use the version of kgrec that wrote it")
    try:
        return _Reader(folder, {c.__name__: c for c in classes}).value(manifest["content"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise KgrecError(f"{file}: found an entry that does not fit ({type(error).__name__}: {error}), "
                         f"expected what kgrec writes; {_AGAIN}") from error


class _Writer:
    """Values to JSON nodes; arrays and long lists go to files, equal ones to one file."""

    def __init__(self, folder: pathlib.Path, classes: set[str]):
        self.folder, self.classes = folder, classes
        self.names: set[str] = {MANIFEST}
        self.written: dict[tuple, str] = {}  # content -> file

    def node(self, value: Any, name: str) -> Any:
        if value is None or isinstance(value, (bool, int, str)):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else {"kind": "float", "value": repr(value)}
        if isinstance(value, np.generic):
            return {"kind": "scalar", "dtype": value.dtype.str, "value": self.node(value.item(), name)}
        if isinstance(value, Files):
            return self._files(value, name)
        if dataclasses.is_dataclass(value) and type(value).__name__ in self.classes:
            fields = {f.name: self.node(getattr(value, f.name), _join(name, f.name)) for f in dataclasses.fields(value)}
            return {"kind": "class", "class": type(value).__name__, "fields": fields}
        if sp.issparse(value) and value.format == "csr":
            parts = {part: self.node(getattr(value, part), _join(name, part)) for part in _CSR}
            return {"kind": "csr", "shape": list(value.shape), **parts}
        if isinstance(value, Mapping):
            return self._mapping(value, name)
        if isinstance(value, (tuple, list)):
            if len(value) >= _LONG and all(isinstance(v, str) for v in value):
                return {"kind": "strings", "count": len(value), "file": self._json(list(value), name)}
            return {"kind": "tuple", "items": [self.node(v, _join(name, str(n))) for n, v in enumerate(value)]}
        if hasattr(value, "__array__") and hasattr(value, "dtype"):
            return self._array(np.asarray(value), name)
        raise TypeError(f"recommender: {name}: found a {type(value).__name__}, which has no form on disk")

    def _mapping(self, value: Mapping, name: str) -> dict:
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"recommender: {name}: found a mapping with keys that are no strings")
        if len(value) >= _LONG and all(type(v) in (int, str) for v in value.values()):
            return {"kind": "table", "count": len(value), "file": self._json(dict(value), name)}
        return {"kind": "map", "items": {key: self.node(v, _join(name, key)) for key, v in value.items()}}

    def _array(self, value: np.ndarray, name: str) -> dict:
        if value.dtype.hasobject:
            raise TypeError(f"recommender: {name}: found an array of Python objects, which has no form on disk")
        # The order in memory is kept: a product over another order may round another way.
        fortran = value.flags.f_contiguous and not value.flags.c_contiguous
        turned = value.T if fortran else value
        plain = np.ascontiguousarray(turned).reshape(turned.shape)  # which makes one axis of none
        key = (value.dtype.str, value.shape, fortran, hashlib.blake2b(plain.reshape(-1).view(np.uint8)).digest())
        if key not in self.written:
            self.written[key] = self._name(name, ".npy")
            np.save(self.folder / self.written[key], plain.T if fortran else plain, allow_pickle=False)
        return {"kind": "array", "dtype": value.dtype.str, "shape": list(value.shape), "file": self.written[key]}

    def _files(self, value: Files, name: str) -> dict:
        below = self._name(name, "")
        (self.folder / below).mkdir()
        for file in value.names:
            shutil.copyfile(value.folder / file, self.folder / below / file)
        return {"kind": "files", "folder": below, "names": list(value.names)}

    def _json(self, value: Any, name: str) -> str:
        file = self._name(name, ".json")
        _write_json(self.folder / file, value, indent=0)
        return file

    def _name(self, name: str, suffix: str) -> str:
        """A file name of its own, also where letters of either case are one."""
        base = re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip(".") or "value"
        tries = (f"{base[:150]}{n or ''}{suffix}" for n in range(len(self.names) + 1))
        free = next(t for t in tries if t.lower() not in self.names)
        self.names.add(free.lower())
        return free


class _Reader:
    """JSON nodes to values; a file that two nodes name is read once."""

    def __init__(self, folder: pathlib.Path, classes: Mapping[str, type]):
        self.folder, self.classes = folder, classes
        self.arrays: dict[str, np.ndarray] = {}

    def value(self, node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        kind = node["kind"]
        if kind == "class":
            return self._instance(node)
        if kind == "map":
            return {key: self.value(v) for key, v in node["items"].items()}
        if kind == "tuple":
            return tuple(self.value(v) for v in node["items"])
        if kind == "array":
            return self._array(node)
        if kind == "csr":
            return sp.csr_matrix(tuple(self.value(node[part]) for part in _CSR), shape=tuple(node["shape"]))
        if kind in ("strings", "table"):
            return self._long(node, list if kind == "strings" else dict)
        if kind == "scalar":
            return np.dtype(node["dtype"]).type(self.value(node["value"]))
        if kind == "float":
            return float(node["value"])
        if kind == "files":
            return self._files(node)
        raise ValueError(f"unknown kind {kind!r}")

    def _instance(self, node: dict) -> Any:
        name = node["class"]
        if name not in self.classes:
            raise KgrecError(f"{self.folder / MANIFEST}: found the unknown class {name}, expected one of "
                             f"{', '.join(sorted(self.classes))}; use the version of kgrec that wrote it")
        return self.classes[name](**{field: self.value(v) for field, v in node["fields"].items()})

    def _path(self, name: str) -> pathlib.Path:
        if not isinstance(name, str) or pathlib.PurePath(name).name != name:
            raise ValueError(f"file name {name!r} that leaves the folder")
        path = self.folder / name
        if not path.exists():
            raise KgrecError(f"{path}: found no such file, expected what {MANIFEST} names; {_AGAIN}")
        return path

    def _array(self, node: dict) -> np.ndarray:
        if node["file"] not in self.arrays:
            path = self._path(node["file"])
            large = math.prod(node["shape"]) * np.dtype(node["dtype"]).itemsize >= _MAPPED and len(node["shape"]) > 1
            try:
                held = np.asarray(np.load(path, mmap_mode="r" if large else None, allow_pickle=False))
            except (ValueError, EOFError, OSError) as error:
                raise KgrecError(f"{path}: found no whole .npy array ({str(error).splitlines()[0]}), "
                                 f"expected {node['shape']} of {node['dtype']}; {_AGAIN}") from error
            if list(held.shape) != node["shape"] or held.dtype != np.dtype(node["dtype"]):
                raise KgrecError(f"{path}: found {list(held.shape)} of {held.dtype.str}, expected {node['shape']} of "
                                 f"{node['dtype']}; {_AGAIN}")
            self.arrays[node["file"]] = held
        return self.arrays[node["file"]]

    def _long(self, node: dict, kind: type) -> Any:
        path = self._path(node["file"])
        held = _read_json(path)
        if not isinstance(held, kind) or len(held) != node["count"]:
            size = len(held) if isinstance(held, (list, dict)) else "no"
            raise KgrecError(f"{path}: found {size} entries, expected {node['count']}; {_AGAIN}")
        return tuple(held) if kind is list else held

    def _files(self, node: dict) -> Files:
        folder = self._path(node["folder"])
        absent = [n for n in node["names"] if pathlib.PurePath(n).name != n or not (folder / n).is_file()]
        if absent:
            raise KgrecError(f"{folder / absent[0]}: found no such file, expected what {MANIFEST} names; {_AGAIN}")
        return Files(folder.absolute(), tuple(node["names"]))


def _join(name: str, part: str) -> str:
    return f"{name}.{part}" if name else part


def _write_json(path: pathlib.Path, value: Any, indent: int) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent) + "\n", encoding="utf-8")


def _read_json(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise KgrecError(f"{path}: found no readable JSON ({error}); {_AGAIN}") from error
