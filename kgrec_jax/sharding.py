"""Where arrays live: one mesh of two axes, and a table of path patterns that can be read aloud."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kgrec_jax.errors import KgrecError

# (pattern, spec) rows: the first pattern that `re.search` finds in a leaf's path "a/b/c" decides; the last row is ".*".
Rules = tuple[tuple[str, P], ...]

# Large tables are cut into rows over all axes: then neither lookups nor their gradients move more than a batch.
TABLE = P(("data", "model"), None)
REPLICATED: Rules = ((r".*", P()),)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How the devices are arranged: `data` ways over the examples, `model` ways over wide layers."""

    data: int = -1  # ways over the examples of a batch; -1: what the other axis leaves
    model: int = 1  # ways over the width of layers; -1: what the other axis leaves


def make_mesh(cfg: MeshConfig = MeshConfig(), devices: list | None = None) -> Mesh:
    """The mesh ("data", "model") over `devices` (all there are by default); works from one CPU to a pod.

    Raises KgrecError where data × model is not the number of devices.
    """
    devices = list(jax.devices()) if devices is None else list(devices)
    data, model = cfg.data, cfg.model
    if (data < 1 and data != -1) or (model < 1 and model != -1) or data == model == -1:
        raise KgrecError(f"mesh: found data={data}, model={model}, expected positive numbers, at most one of them -1")
    if data == -1:
        data = len(devices) // model
    elif model == -1:
        model = len(devices) // data
    if data * model != len(devices):
        raise KgrecError(f"mesh: found data={cfg.data}, model={cfg.model} for {len(devices)} devices, expected a "
                         f"product of {len(devices)}; change mesh.data or mesh.model")
    return jax.make_mesh((data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def path_name(path: tuple) -> str:
    """A pytree key path as "a/b/c"."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def shardings(abstract_tree: Any, mesh: Mesh, rules: Rules) -> Any:
    """The NamedSharding of every leaf of a tree of arrays or ShapeDtypeStructs. Scalars are replicated.

    The same rules fit a whole train state, since an optimiser's moments have paths that end like their parameter's.
    Raises KgrecError naming parameter, shape and axis where an axis does not divide a dimension.
    """

    def of(path, leaf):
        name, shape = path_name(path), np.shape(leaf)
        if not shape:
            return NamedSharding(mesh, P())
        spec = next((spec for pattern, spec in rules if re.search(pattern, name)), None)
        if spec is None:
            raise KgrecError(f"sharding rules: found no row for {name} {shape}, expected a last row '.*'")
        if len(spec) > len(shape):
            raise KgrecError(f"sharding rules: {name} has shape {shape}, expected at least {len(spec)} dimensions "
                             f"for {spec}")
        for size, axes in zip(shape, spec):
            ways = _ways(mesh, axes)
            if size % ways:
                raise KgrecError(f"sharding rules: {name} has shape {shape}: {size} is not divisible by the {ways} "
                                 f"devices of axis {axes!r}; pad the table (sharding.padded_rows) or change the mesh")
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(of, abstract_tree)


def _ways(mesh: Mesh, axes: str | tuple[str, ...] | None) -> int:
    axes = () if axes is None else (axes,) if isinstance(axes, str) else axes
    return math.prod(mesh.shape[a] for a in axes)


def padded_rows(n: int, mesh: Mesh | int) -> int:
    """The number of rows that a table of `n` rows is padded to: a multiple of eight per device, and at least one.

    `mesh` may also be the number of devices.
    """
    unit = 8 * (mesh if isinstance(mesh, int) else mesh.size)
    return max(math.ceil(n / unit), 1) * unit


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """A batch of NumPy arrays as global arrays, cut over "data" along axis 0 (scalars are replicated).

    Every process passes the same whole batch and keeps its rows, so results do not depend on the number of processes.
    Raises KgrecError where the batch does not divide.
    """

    def put(path, x):
        x = np.asarray(x)
        if not x.ndim:
            sharding = NamedSharding(mesh, P())
        elif x.shape[0] % mesh.shape["data"]:
            raise KgrecError(f"batch field {path_name(path)}: found {x.shape[0]} rows, expected a multiple of the "
                             f"{mesh.shape['data']} devices of axis 'data'; change the batch size or mesh.data")
        else:
            sharding = NamedSharding(mesh, P("data"))
        if jax.process_count() == 1:
            return jax.device_put(x, sharding)
        return jax.make_array_from_process_local_data(sharding, x, global_shape=x.shape)

    return jax.tree_util.tree_map_with_path(put, batch)


def put(tree: Any, tree_shardings: Any) -> Any:
    """A tree of host or device arrays, the same on every process, placed as `tree_shardings` says."""

    def one(x, sharding):
        if jax.process_count() == 1:
            return jax.device_put(x, sharding)
        x = np.asarray(x)
        return jax.make_array_from_process_local_data(sharding, x, global_shape=x.shape)

    return jax.tree.map(one, tree, tree_shardings)


def active_mesh() -> jax.sharding.AbstractMesh | None:
    """The mesh of `jax.set_mesh` where the code is traced, or None: no mesh, one device, or inside shard_map."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or any(t == AxisType.Manual for t in mesh.axis_types):
        return None
    return mesh


def constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """`x` with its dimensions laid over mesh axes (None: not cut); unchanged without a mesh or if one does not fit."""
    mesh = active_mesh()
    if mesh is None:
        return x
    for size, names in zip(x.shape, axes):
        names = () if names is None else (names,) if isinstance(names, str) else names
        if size % math.prod(mesh.shape[a] for a in names):
            return x
    return jax.lax.with_sharding_constraint(x, P(*axes))
