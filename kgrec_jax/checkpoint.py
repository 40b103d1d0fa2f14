"""Orbax checkpoints: whole trees that bridge the stages, parts of them, and the series that a loop resumes from.

A checkpoint is written under a temporary name and renamed: it is whole or it is not there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from kgrec_jax.errors import KgrecError
from kgrec_jax.sharding import path_name
from kgrec_jax.tracking import is_main_process


_SHARED_BYTES = 1 << 20  # of a device's share of a replicated array, from which on all of them write


@contextlib.contextmanager
def _readable(path: pathlib.Path) -> Iterator[None]:
    """Turns what Orbax and TensorStore raise on a damaged folder (a dozen types) into one line."""
    try:
        yield
    except KgrecError:
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0][:200]
        raise KgrecError(f"{path}: found a damaged checkpoint ({type(error).__name__}: {first}), expected what a run "
                         "wrote; remove the folder of this stage and run it again") from error


def save_tree(path: str | os.PathLike, tree: Any) -> None:
    """Writes a tree of arrays and numbers as one checkpoint folder in place of an older one, whole or not at all."""
    path = pathlib.Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_main_process():  # what a kill left; Orbax clears it too, but with a warning
        shutil.rmtree(path.with_name(f"{path.name}.orbax-checkpoint-tmp"), ignore_errors=True)
    with _saving():
        ocp.save(path, jax.tree.map(_storable, tree), overwrite=True)


def _saving() -> ocp.Context:
    """How arrays are written. Orbax lets every device write its share of what each of them holds whole, and compiles a
    program for each such share: of small arrays that costs seconds and saves nothing, so one device writes them."""
    context = ocp.Context()
    context.array.saving.min_slice_bytes_for_replica_parallel = _SHARED_BYTES
    return context


def load_tree(path: str | os.PathLike, abstract: Any = None) -> Any:
    """A checkpoint's whole tree.

    `abstract`: the same tree of ShapeDtypeStructs or arrays, which says where each leaf shall live (their shardings, of
    any mesh; the first device where they have none; NumPy stays NumPy). Without it all arrays are NumPy. Raises
    KgrecError where the folder holds no checkpoint or another tree.
    """
    path = _existing(path)
    with _readable(path):
        stored = ocp.metadata(path).metadata
        if abstract is None:
            return ocp.load(path, jax.tree.map(_as_numpy, stored))
        _check(path, stored, abstract, partial=False)
        return ocp.load(path, jax.tree.map(_abstract_leaf, abstract))


def load_part(path: str | os.PathLike, abstract: Any) -> Any:
    """The sub-tree of a checkpoint that `abstract` names, without reading the rest.

    `path` may also be the folder of a training run's checkpoints (the latest one is read; its tree is
    {"step", "params", "opt_state"}). Raises KgrecError where a leaf is missing or has another shape.
    """
    path = _existing(path)
    with _readable(path):
        _check(path, ocp.metadata(path).metadata, abstract, partial=True)
        return _load_part(path, abstract)


def _load_part(path: pathlib.Path, abstract: Any) -> Any:
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        return ocp.load(path, jax.tree.map(_abstract_leaf, abstract), checkpointable_name="state")


def _storable(x: Any) -> Any:
    # Orbax refuses NumPy scalars; a 0-d array holds the same.
    return np.asarray(x) if isinstance(x, np.generic) else x


def _as_numpy(x: Any) -> Any:
    return np.empty(x.shape, x.dtype) if hasattr(x, "shape") else x


def _abstract_leaf(x: Any) -> Any:
    if isinstance(x, np.ndarray) or not hasattr(x, "shape"):
        return x
    # Without a sharding Orbax would ask for the devices of the machine that saved.
    sharding = getattr(x, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _existing(path: str | os.PathLike) -> pathlib.Path:
    path = pathlib.Path(path).absolute()
    if ocp.is_orbax_checkpoint(path):
        return path
    steps = sorted(int(p.name) for p in path.glob("*") if p.name.isdigit()) if path.is_dir() else []
    if not steps:
        raise KgrecError(f"{path}: found no checkpoint, expected one of an earlier stage; run that stage first")
    return path / str(steps[-1])


def _check(path: pathlib.Path, stored: Any, abstract: Any, partial: bool) -> None:
    """Raises one line that names the leaves which differ; Orbax's own error is 80 lines of event loop."""
    has, wants = _shapes(stored), _shapes(abstract)
    wrong = [f"{name} is missing" for name in wants if name not in has]
    if not partial:
        wrong += [f"{name} is not expected" for name in has if name not in wants]
    wrong += [f"{name} has shape {has[name]}, expected {shape}" for name, shape in wants.items()
              if name in has and has[name] != shape]
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise KgrecError(f"{path}: {'; '.join(wrong[:4])}{more}: the checkpoint is of another model; "
                         "use a new run folder")


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {path_name(path): tuple(np.shape(leaf)) if not hasattr(leaf, "shape") else tuple(leaf.shape)
            for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


@dataclasses.dataclass
class _LatestAndBest:
    """Keeps the newest checkpoint and the one that the newest names as the best so far."""

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        del context
        best = (checkpoints[-1].metrics or {}).get("best_step", -1) if checkpoints else -1
        return [c.step == best or i == len(checkpoints) - 1 for i, c in enumerate(checkpoints)]


class Checkpoints:
    """The checkpoints of one training run: `state` (a pytree) and `meta` (JSON) under each step. A context manager."""

    def __init__(self, folder: str | os.PathLike):
        folder = pathlib.Path(folder).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        with _readable(folder), _saving():
            self._checkpointer = ocp.training.Checkpointer(
                folder, preservation_policy=_LatestAndBest(), cleanup_tmp_directories=True)

    @property
    def latest(self) -> int | None:
        """The last step that was saved whole."""
        with _readable(self.folder):
            found = self._checkpointer.latest
        return None if found is None else found.step

    def save(self, step: int, state: Any, meta: dict, best_step: int = -1) -> None:
        """Starts writing; returns once `state` may be donated. `best_step` stays on disk beside the latest."""
        if step == self.latest:
            return
        with _saving():
            self._checkpointer.save_async(
                step, jax.tree.map(_storable, state), metrics={"best_step": best_step},
                custom_metadata={"meta": json.dumps(meta)}, force=True)

    def load(self, step: int, abstract_state: Any, part: bool = False) -> Any:
        """The state of `step`, or the part of it that is named, on the devices that `abstract_state` names."""
        path = self.folder / str(step)
        with _readable(path):
            _check(path, ocp.metadata(path).metadata, abstract_state, partial=part)
            return _load_part(path, abstract_state)

    def load_meta(self, step: int) -> dict:
        """The JSON of `step`."""
        with _readable(self.folder / str(step)):
            return json.loads(self._checkpointer.metadata(step).custom_metadata["meta"])

    def wait(self) -> None:
        """Returns when everything is on the disk."""
        self._checkpointer.wait()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exc: object) -> None:
        self._checkpointer.close()
