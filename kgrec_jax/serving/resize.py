"""A model with other items: some of its rows, and blank ones behind them for items that nothing is known of."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import scipy.sparse as sp

from kgrec_jax.errors import KgrecError
from kgrec_jax.linear.parts import (
    Constant,
    Factors,
    FoldIn,
    ItemWeights,
    RidgeWeights,
    UserFactors,
    UserNeighbours,
)
from kgrec_jax.models.domain_towers import DomainPart
from kgrec_jax.models.propagation import PropagationPart
from kgrec_jax.models.recommender import FusedModel, TowerPart

# Class -> the axes of its arrays that go over the items. A blank item is 0 everywhere, and so is not known.
ITEM_AXES: dict[type, dict[str, tuple[int, ...]]] = {
    ItemWeights: {"weights": (0, 1), "known": (0,)},
    RidgeWeights: {"weights": (0, 1), "known": (0,), "inverse_diagonal": (0,), "own": (0,)},
    Factors: {"encode": (0,), "decode": (1,), "known": (0,)},
    Constant: {"values": (0,), "known": (0,)},
    UserNeighbours: {"train": (1,), "known": (0,)},
    FoldIn: {"items": (0,), "known": (0,)},
    UserFactors: {"items": (0,), "encode": (0,), "known": (0,)},
    PropagationPart: {"encode": (1,), "decode": (0,), "known": (0,)},
}


def along(array: Any, axis: int, keep: np.ndarray, blank: int) -> Any:
    """Rows `keep` of one axis of a dense or CSR array, and `blank` rows of zeros behind them."""
    if sp.issparse(array):
        taken = array[keep] if axis == 0 else array[:, keep]
        shape = (len(keep) + blank, array.shape[1]) if axis == 0 else (array.shape[0], len(keep) + blank)
        return sp.csr_matrix((taken.data, taken.indices, np.pad(taken.indptr, (0, blank if axis == 0 else 0), "edge")),
                             shape=shape)
    out = np.zeros((*array.shape[:axis], len(keep) + blank, *array.shape[axis + 1:]), array.dtype)
    out[(slice(None),) * axis + (slice(0, len(keep)),)] = np.take(array, keep, axis=axis)
    return out


def with_rows(array: np.ndarray, first: int, rows: np.ndarray) -> np.ndarray:
    """The array with its rows from `first` on replaced."""
    out = np.array(array)
    out[first:] = rows
    return out


def check_resizable(part: Any) -> None:
    """KgrecError for a part of the score that items cannot join or leave."""
    if isinstance(part, DomainPart):
        raise KgrecError("recommender: found one of a run of several domains (part domains), which keeps no tower that "
                         "could read new items, expected that of a domain alone; use RUN/alone/NAME of the run of "
                         "kgrec domains in place of RUN/joined/NAME")
    if type(part) not in ITEM_AXES:
        raise KgrecError(f"recommender: found a part of the kind {type(part).__name__}, which items cannot join, "
                         f"expected one of {', '.join(kind.__name__ for kind in ITEM_AXES)}; run it again with them")


def resized(part: Any, keep: np.ndarray, blank: int) -> Any:
    """A part of the score over the items `keep` and `blank` further ones."""
    check_resizable(part)
    changed = {}
    for field, axes in ITEM_AXES[type(part)].items():
        changed[field] = getattr(part, field)
        for axis in axes:
            changed[field] = along(changed[field], axis, keep, blank)
    return dataclasses.replace(part, **changed)


def resized_tower(tower: TowerPart, keep: np.ndarray, blank: int) -> TowerPart:
    """The towers over other items; a blank item has no free row."""
    items = {**tower.params["items"], "item_embeddings": along(tower.params["items"]["item_embeddings"], 0, keep, blank)
             } if "items" in tower.params else None
    return dataclasses.replace(
        tower, params=tower.params if items is None else {**tower.params, "items": items},
        item_vectors=along(tower.item_vectors, 0, keep, blank), known=along(tower.known, 0, keep, blank),
        others=tuple(resized_tower(other, keep, blank) for other in tower.others),
        item_parts={name: along(part, 0, keep, blank) for name, part in tower.item_parts.items()})


def resized_model(model: FusedModel, keep: np.ndarray, blank: int) -> FusedModel:
    """The fused model over other items; nobody has touched a blank one, so it is cold."""
    parts = {name: resized(part, keep, blank) for name, part in model.parts.items()}
    return dataclasses.replace(
        model, parts=parts, popularity=along(model.popularity, 0, keep, blank),
        tower=None if model.tower is None else resized_tower(model.tower, keep, blank))
