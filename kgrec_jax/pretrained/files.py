"""The files of a checkpoint folder: config.json and weights, whole or in shards, as safetensors or Flax msgpack."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from kgrec_jax.errors import KgrecError
from kgrec_jax.pretrained import names

_POINTER = b"version https://git-lfs"
# Reads the tensors of .bin files without running their code, and writes them as they are.
_CONVERT = ("import glob, torch; from safetensors.torch import save_file; "
            "save_file({k: v.clone().contiguous() for f in glob.glob('pytorch_model*.bin') "
            "for k, v in torch.load(f, map_location='cpu', weights_only=True).items()}, 'model.safetensors')")


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The object in a JSON file; KgrecError where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise KgrecError(f"{path}: found no readable JSON ({error}), expected {what}; fetch it again") from error
    if not isinstance(found, dict):
        raise KgrecError(f"{path}: found a JSON {type(found).__name__}, expected an object; fetch it again")
    return found


def read_weights(folder: Path, kind: str) -> tuple[Path, dict[str, np.ndarray]]:
    """(file read, Flax path -> array with kernels [in, out]) of the folder's checkpoint of model type `kind`.

    Raises KgrecError for files that are damaged or missing, and for formats that are not read.
    """
    for name, reader in (("model.safetensors", _read_safetensors), ("flax_model.msgpack", _read_msgpack)):
        whole, index = folder / name, folder / f"{name}.index.json"
        if whole.is_file():
            return whole, _read(reader, whole, kind)
        if index.is_file():
            flat: dict[str, np.ndarray] = {}
            for shard in _shards(index):
                flat.update(_read(reader, shard, kind))
            return index, flat
    other = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".h5", ".pt", ".onnx"))
    advice = "save the model with save_pretrained in one of the two (.bin files are neither read nor fetched)"
    if any(folder.glob("pytorch_model*.bin")):
        advice = f"where torch is installed, convert it: cd {shlex.quote(str(folder))} && python -c \"{_CONVERT}\""
    raise KgrecError(f"{folder}: found {', '.join(other) or 'no weights'}, expected model.safetensors or "
                     f"flax_model.msgpack; {advice}")


def _read(reader: Callable, path: Path, kind: str) -> dict[str, np.ndarray]:
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise KgrecError(f"{path}: found a pointer of Git LFS, expected the weights that it stands for; fetch them "
                             "with git lfs pull")
    return reader(path, kind)


def _shards(index: Path) -> list[Path]:
    """The files that an index names."""
    shards = read_json(index, "the index of a sharded checkpoint").get("weight_map")
    files = list(shards.values()) if isinstance(shards, dict) else []
    if not files or not all(isinstance(file, str) and file == Path(file).name for file in files):
        raise KgrecError(f"{index}: found no weight_map from weights to the names of files, expected the index of a "
                         "sharded checkpoint; fetch it again")
    absent = sorted({file for file in files if not (index.parent / file).is_file()})
    if absent:
        raise KgrecError(f"{index}: found no file {', '.join(absent)}, expected every shard that it names; fetch "
                         f"{'it' if len(absent) == 1 else 'them'} into the folder")
    return [index.parent / file for file in sorted(set(files))]


def _read_safetensors(path: Path, kind: str) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        raw = load_file(path)
    except (SafetensorError, OSError, KeyError, ValueError) as error:  # the last two: types that NumPy has not
        raise KgrecError(f"{path}: found no readable safetensors file ({error}); fetch it again") from error
    return dict(names.from_torch(kind, name, value) for name, value in raw.items())


def _read_msgpack(path: Path, kind: str) -> dict[str, np.ndarray]:
    from flax.serialization import msgpack_restore
    from flax.traverse_util import flatten_dict

    try:
        tree = msgpack_restore(path.read_bytes())
        tree = tree.get("params", tree)
        flat = {"/".join(keys): np.asarray(value) for keys, value in flatten_dict(tree).items()}
    except Exception as error:  # msgpack raises a dozen types of its own on a damaged file
        raise KgrecError(f"{path}: found no readable Flax msgpack ({type(error).__name__}: {error}); "
                         "fetch it again") from error
    return dict(names.from_flax(kind, name, value) for name, value in flat.items())


def as_float32(value: np.ndarray, name: str, where: str) -> np.ndarray:
    """A weight as contiguous float32; KgrecError for integers (a quantised file) and for values that are not finite."""
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise KgrecError(f"{where}: {name}: found values of type {value.dtype}, expected floats; take a checkpoint "
                         "that is not quantised")
    value = np.ascontiguousarray(value, np.float32)
    if not np.isfinite(value).all():
        raise KgrecError(f"{where}: {name}: found values that are not finite, expected numbers; the file is damaged or "
                         "its training diverged: take another checkpoint")
    return value
