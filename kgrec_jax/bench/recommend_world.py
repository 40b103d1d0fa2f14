"""What `kgrec bench recommend` measures on: the arrays that both programs read, of a dataset folder or generated."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
import scipy.sparse.linalg

from kgrec_jax.data.dataset import Dataset
from kgrec_jax.errors import KgrecError

PARTS = ("train", "valid", "test")
FACTORS = 64  # width of the vectors that are ranked by
DRAWN, TRAIN, HELD = 400, 20, 5  # generated: items that a user looks at, those it takes, those of valid and of test
_ROWS = 512  # users that are generated at a time


def arrays_of(data: Dataset, linked: bool) -> tuple[dict[str, np.ndarray], int]:
    """(train, valid, test [n, 2] pairs of user and item rows, triples [T, 3], counts; interactions left out).

    `linked`: of the items only those with a triple, as RecBole's graph models know no others; entities are the items
    and then whatever else a triple names. KgrecError where a part or the graph is missing.
    """
    found = data.interactions
    for number, name in enumerate(PARTS):
        if not data.has_fixed_split or not (data.part == number).any():
            raise KgrecError(f"--data: found no {name} part in {data.name}, expected train.tsv, valid.tsv and "
                             "test.tsv; both programs have to read one split")
    keep = np.zeros(data.graph.num_entities, bool)  # an item without interaction is no candidate to RecBole
    keep[found.item] = True
    triples = np.unique(data.graph.triples[data.graph.part == 0], axis=0)
    if linked:
        if not len(triples):
            raise KgrecError(f"--models: found no triples in {data.name}, expected some for kgin and kgat; "
                             "give --models lightgcn")
        keep &= np.isin(np.arange(len(keep)), triples[:, [0, 2]])
    there = keep[found.item]
    user, item = found.user[there], found.item[there]
    users, user = np.unique(user, return_inverse=True)
    num_items = int(keep.sum())
    row = np.where(keep, np.cumsum(keep) - 1, -1)
    if linked:
        others = np.setdiff1d(triples[:, [0, 2]], np.flatnonzero(keep))
        row[others] = num_items + np.arange(len(others))
        relations, relation = np.unique(triples[:, 1], return_inverse=True)
        triples = np.stack([row[triples[:, 0]], relation, row[triples[:, 2]]], axis=1)
    pairs, part = np.stack([user, row[item]], axis=1), data.part[there]
    out = {name: pairs[part == number] for number, name in enumerate(PARTS)}
    out |= {"num_users": np.array(len(users)), "num_items": np.array(num_items)}
    return (out | {"triples": triples} if linked else out), int((~there).sum())


def factors_of(arrays: dict[str, np.ndarray], width: int = FACTORS) -> dict[str, np.ndarray]:
    """Vectors of users and items to rank by: the truncated singular value decomposition of who touched what."""
    size = int(arrays["num_users"]), int(arrays["num_items"])
    train = arrays["train"]
    matrix = sp.csr_matrix((np.ones(len(train), np.float32), tuple(train.T)), shape=size)
    left, values, right = sp.linalg.svds(matrix, k=min(width, min(size) - 1), v0=np.ones(min(size), np.float32))
    return {"user_factors": np.ascontiguousarray(left * values, np.float32),
            "item_factors": np.ascontiguousarray(right.T, np.float32)}


def generated(users: int, items: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Arrays of so many users and items, and vectors that say a little about who touches what.

    A user looks at some items and takes those that suit it; every item is touched, every user has all three parts.
    """
    least = TRAIN + 2 * HELD + 1
    if items < least or users < 2:
        raise KgrecError(f"--sizes: found {users} users and {items} items, expected at least {least} of each")
    rng = np.random.default_rng(seed)
    left, right = (rng.standard_normal((n, FACTORS)).astype(np.float32) for n in (users, items))
    taken = TRAIN + 2 * HELD
    chosen = np.empty((users, taken), np.int64)
    for start in range(0, users, _ROWS):
        rows = np.arange(start, min(start + _ROWS, users))
        # Draws without a repetition: a random start and a stride that shares no factor with the number of items.
        steps = _coprime(items, rng) * np.arange(min(DRAWN, items))
        looked = (rng.integers(items, size=(len(rows), 1)) + steps) % items  # [b, DRAWN]
        scores = np.einsum("bd,bnd->bn", left[rows], right[looked])
        best = np.argsort(-scores, axis=1, kind="stable")[:, :taken]
        chosen[rows] = rng.permuted(np.take_along_axis(looked, best, axis=1), axis=1)
    who = np.repeat(np.arange(users), taken).reshape(users, taken)
    cuts = dict(zip(PARTS, ((0, TRAIN), (TRAIN, TRAIN + HELD), (TRAIN + HELD, taken))))
    out = {name: np.stack([who[:, a:b].ravel(), chosen[:, a:b].ravel()], axis=1) for name, (a, b) in cuts.items()}
    left_over = np.setdiff1d(np.arange(items), chosen)
    extra = np.stack([rng.integers(users, size=len(left_over)), left_over], axis=1)
    return out | {"train": np.concatenate([out["train"], extra]), "num_users": np.array(users),
                  "num_items": np.array(items), "user_factors": left, "item_factors": right}


def _coprime(number: int, rng: np.random.Generator) -> int:
    """A stride of 1 to number - 1 that shares no factor with it."""
    while True:
        stride = int(rng.integers(1, number))
        if np.gcd(stride, number) == 1:
            return stride
