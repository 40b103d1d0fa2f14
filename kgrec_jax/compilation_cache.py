"""The persistent compilation cache: on by default, keyed by JAX version and CPU, and never left with a broken entry.

JAX writes an entry in place and never rewrites one, so a process that is killed while it writes leaves an entry that
warns at every later start. Entries are therefore checked here before JAX sees them, each once.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import pathlib
import platform
import zlib

from kgrec_jax.data.sources import cache_root
from kgrec_jax.tracking import write_text

_CHECKED = "checked.json"  # {entry name: [bytes, mtime in ns]} of the entries that were found whole
_SUFFIX = "-cache"  # of JAX's entries
_MAX_BYTES = 2 << 30  # beyond it the oldest entries go
_MIN_COMPILE_SECONDS = 0.1


def enable(folder: str | os.PathLike | None = None) -> pathlib.Path | None:
    """Turns the cache on and returns its folder, made and mended; call it before the first compilation.

    The folder is KGREC_CACHE/compilation/JAX-VERSION-CPU unless given. None where KGREC_NO_COMPILATION_CACHE=1 switches
    it off, where JAX has been given a cache folder of its own, or where the folder cannot be written.
    """
    import jax

    if os.environ.get("KGREC_NO_COMPILATION_CACHE") == "1":
        return None
    if folder is None:
        if jax.config.jax_compilation_cache_dir:
            return None
        folder = cache_root() / "compilation" / f"{jax.__version__}-{cpu_id()}"
    folder = pathlib.Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        mend(folder)
    except OSError:
        return None  # a full or read-only disk costs compile time, not the run
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_COMPILE_SECONDS)
    return folder


def mend(folder: pathlib.Path) -> list[str]:
    """Deletes entries that cannot be read whole, and the oldest beyond the size limit; returns their names.

    An entry found whole is not read again until its size or time changes, so hundreds of entries take milliseconds.
    """
    checked, gone = _read_checked(folder), []
    whole: dict[str, list[int]] = {}
    for entry in os.scandir(folder):
        if not entry.name.endswith(_SUFFIX):
            continue
        stat = entry.stat()
        seen = [stat.st_size, stat.st_mtime_ns]
        if checked.get(entry.name) == seen or _is_whole(pathlib.Path(entry.path)):
            whole[entry.name] = seen
        else:
            gone.append(entry.name)
    size = sum(s for s, _ in whole.values())
    for name in sorted(whole, key=lambda name: whole[name][1]):
        if size <= _MAX_BYTES:
            break
        size -= whole.pop(name)[0]
        gone.append(name)
    for name in gone:
        (folder / name).unlink(missing_ok=True)
    if whole != checked:
        write_text(folder / _CHECKED, json.dumps(whole))
    return gone


def cpu_id() -> str:
    """Eight hexadecimal digits of the CPU's model and features: compiled code of one does not always run on another."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            first = file.read().split("\n\n")[0].splitlines()
        told = [line for line in first if line.startswith(("model name", "flags", "Features", "CPU part"))]
    except OSError:
        told = [platform.processor()]
    return hashlib.sha256("\n".join([platform.machine(), *told]).encode()).hexdigest()[:8]


def _read_checked(folder: pathlib.Path) -> dict[str, list[int]]:
    try:
        return json.loads((folder / _CHECKED).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def _is_whole(path: pathlib.Path) -> bool:
    """True where the entry's compressed stream, which carries a checksum or its length, ends where it should."""
    data = path.read_bytes()
    if data[:4] == b"\x28\xb5\x2f\xfd":  # zstandard, which JAX prefers where a module for it is installed
        return _is_whole_zstd(data)
    stream = zlib.decompressobj()
    try:
        stream.decompress(data)
    except zlib.error:
        return False
    return stream.eof and not stream.unused_data


def _is_whole_zstd(data: bytes) -> bool:
    for name in ("compression.zstd", "zstandard"):
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        try:
            (module.decompress if hasattr(module, "decompress") else module.ZstdDecompressor().decompress)(data)
        except Exception:  # each module has an error class of its own, and all of them mean a broken entry
            return False
        return True
    return False  # JAX could not read it either
