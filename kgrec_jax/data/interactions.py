"""Cutting the interactions into train, valid and test, and freezing the cut to disk.

Everything here sees user and item rows alone; what follows from a split (known items, candidates) is the evaluation's.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Literal

import numpy as np

from kgrec_jax.data.dataset import Dataset, Interactions, Split
from kgrec_jax.data.log import PARTS
from kgrec_jax.data.media import read_ids
from kgrec_jax.data.tables import Coded, read_table, write_tsv
from kgrec_jax.errors import KgrecError

_MIN_ROWS = 3  # of a user, to have one in each part


@dataclasses.dataclass(frozen=True)
class SplitConfig:
    """How the interactions are cut. What is drawn is a function of the seed and of the data alone."""

    # auto: fixed where the folder has train and test files, else random
    kind: Literal["auto", "random", "leave-last-out", "time", "cold-items", "fixed"] = "auto"
    seed: int = 0  # of everything that is drawn
    items: str = ""  # cold-items: a file with one item id a line; "" draws the items
    cold_share: float = 0.0  # share of the items that leaves training (random: beside the cut; cold-items: 0 means 0.1)
    cold_pool: float = 1.0  # share of the items, least touched first, that cold ones are drawn from: new ones are rare
    valid_share: float = 0.1  # share of each user's items (time: of all interactions) that chooses hyper-parameters
    test_share: float = 0.1  # share that is measured on


def make_split(dataset: Dataset, cfg: SplitConfig) -> Split:
    """Cut `dataset.interactions`.

    random: of each user's items `test_share` and `valid_share`, at least one each; users with fewer than three keep all
    in train. With `cold_share`, that share of the items (drawn from `cold_pool`) leaves training first and all its
    interactions are the test's, and as many other items' are the valid's. leave-last-out: each user's last is the
    test's, the one before the valid's. time: the same shares, of all interactions by time. cold-items: a given or drawn
    list is the test, as many others the valid. fixed: the folder's files; without a valid file a share of each user's
    train rows is cut out, to be given back.
    """
    kind = cfg.kind if cfg.kind != "auto" else "fixed" if dataset.has_fixed_split else "random"
    _check(dataset, cfg, kind)
    if kind == "fixed":
        part, cold, valid_cold = _fixed(dataset, cfg), _NONE, _NONE
    elif kind == "cold-items":
        part, cold, valid_cold = _cold_items(dataset, cfg)
    elif kind == "random":
        part, cold, valid_cold = _random(dataset, cfg)
    else:
        part, cold, valid_cold = (_leave_last_out if kind == "leave-last-out" else _by_time)(dataset, cfg), _NONE, _NONE
    train, valid, test = (dataset.interactions.take(part == p) for p in range(3))
    if not len(train):
        raise KgrecError(f"data.split: found no interaction left to train on in {dataset.name}, expected some; lower "
                         "the shares")
    if not len(test) and cfg.test_share > 0:
        raise KgrecError(f"data.split: found no interaction to test on in {dataset.name} (kind {kind}), expected some; "
                         f"choose another --data.split.kind")
    given = kind == "fixed" and dataset.has_fixed_valid
    return Split(kind, train, valid, test, given, cold, valid_cold)


_NONE = np.zeros(0, np.int32)


def _check(dataset: Dataset, cfg: SplitConfig, kind: str) -> None:
    if not len(dataset.interactions):
        raise KgrecError(f"data.split: found no interactions in {dataset.name}, expected interactions.tsv or train.tsv "
                         f"and test.tsv; only pretrain and graph can run on it")
    if not 0 < cfg.cold_pool <= 1 or 2 * cfg.cold_share > cfg.cold_pool:
        raise KgrecError(f"data.split.cold_pool: found {cfg.cold_pool:g} with cold_share {cfg.cold_share:g}, expected "
                         "a share above 0, at most 1 and at least twice the cold_share")
    if cfg.seed < 0:
        raise KgrecError(f"data.split.seed: found {cfg.seed}, expected at least 0")
    for name in ("cold_share", "valid_share", "test_share"):
        if not 0 <= getattr(cfg, name) < 1:
            raise KgrecError(f"data.split.{name}: found {getattr(cfg, name):g}, expected a share from 0 to below 1")
    if cfg.valid_share + cfg.test_share >= 1 or 2 * cfg.cold_share >= 1:
        raise KgrecError(f"data.split: found valid_share {cfg.valid_share:g}, test_share {cfg.test_share:g} and "
                         f"cold_share {cfg.cold_share:g}, expected some of the data to be left for training; lower "
                         "them")
    if cfg.items and kind != "cold-items":
        raise KgrecError(f"data.split.items: found {cfg.items} for the split {kind}, expected --data.split.kind "
                         "cold-items with it")
    if cfg.cold_share and kind not in ("random", "cold-items"):
        raise KgrecError(f"data.split.cold_share: found {cfg.cold_share:g} for the split {kind}, expected 0, or kind "
                         "random or cold-items")
    if kind == "fixed" and not dataset.has_fixed_split:
        raise KgrecError(f"data.split.kind: found fixed for {dataset.name}, which has no train.tsv and test.tsv, "
                         "expected another kind")
    if kind in ("leave-last-out", "time") and not dataset.has_timestamps:
        raise KgrecError(f"data.split.kind: found {kind} for {dataset.name}, whose log has no timestamps, expected "
                         f"random or cold-items; or add a column timestamp")


def _rng(cfg: SplitConfig, purpose: int) -> np.random.Generator:
    """A stream of its own for each thing drawn, so that drawing one does not move another."""
    return np.random.default_rng(np.random.SeedSequence(cfg.seed, spawn_key=(purpose,)))


def _position(user: np.ndarray, order: np.ndarray, num_users: int) -> tuple[np.ndarray, np.ndarray]:
    """[n] position of each row among its user's rows, counted from the last of `order`; [n] how many that user has."""
    by_user = order[np.argsort(user[order], kind="stable")]
    counts = np.bincount(user, minlength=num_users)
    ends = np.cumsum(counts)
    position = np.empty(len(user), np.int64)
    position[by_user] = ends[user[by_user]] - 1 - np.arange(len(user))
    return position, counts[user]


def _cut_users(log: Interactions, num_users: int, order: np.ndarray, num_test: Callable,
               num_valid: Callable) -> np.ndarray:
    """[n] int8 parts: of each user's rows in `order` the last are the test's, those before them the valid's."""
    position, count = _position(log.user, order, num_users)
    long_enough = count >= _MIN_ROWS
    test = np.where(long_enough, num_test(count), 0)
    valid = np.where(long_enough, num_valid(count), 0)
    return np.where(position < test, 2, np.where(position < test + valid, 1, 0)).astype(np.int8)


def _share(share: float) -> Callable:
    """Rows of a part as a function of a user's rows: the share rounded down, at least one."""
    if share == 0:
        return np.zeros_like
    # The nudge keeps 0.1 * 30 = 3.0000000000000004 and 0.7 * 10 = 6.999999999999999 at what they mean.
    return lambda count: np.maximum(np.floor(share * count + 1e-9), 1).astype(np.int64)


def _cut_randomly(log: Interactions, num_users: int, cfg: SplitConfig, test_share: float,
                  valid_share: float) -> np.ndarray:
    order = _rng(cfg, 0).permutation(len(log))
    return _cut_users(log, num_users, order, _share(test_share), _share(valid_share))


def _random(dataset: Dataset, cfg: SplitConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    log = dataset.interactions
    touched = np.unique(log.item)
    num_cold = round(cfg.cold_share * len(touched))
    drawn = _rng(cfg, 1).permutation(_cold_pool(log, touched, cfg))[:2 * num_cold].astype(np.int32)
    cold, valid_cold = np.sort(drawn[:num_cold]), np.sort(drawn[num_cold:])
    part = _cold_parts(dataset, cold, valid_cold)
    warm = np.flatnonzero(part == 0)
    part[warm] = _cut_randomly(log.take(warm), dataset.num_users, cfg, cfg.test_share, cfg.valid_share)
    return part, cold, valid_cold


def _cold_items(dataset: Dataset, cfg: SplitConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    touched = np.unique(dataset.interactions.item)
    if cfg.items:
        cold = _listed_items(dataset, pathlib.Path(cfg.items))
    else:
        pool = _cold_pool(dataset.interactions, touched, cfg)
        cold = _rng(cfg, 1).permutation(pool)[:max(round((cfg.cold_share or 0.1) * len(touched)), 1)]
    rest = _rng(cfg, 2).permutation(np.setdiff1d(touched, cold))
    # As many again for the validation, but never more than half of what is left: something must be trained on.
    valid_cold = rest[:min(len(cold), len(rest) // 2)] if cfg.valid_share > 0 else rest[:0]
    cold, valid_cold = np.sort(cold).astype(np.int32), np.sort(valid_cold).astype(np.int32)
    return _cold_parts(dataset, cold, valid_cold), cold, valid_cold


def _cold_pool(log: Interactions, touched: np.ndarray, cfg: SplitConfig) -> np.ndarray:
    """The items that cold ones are drawn from, in order of their rows."""
    counts = np.bincount(log.item)[touched]
    return np.sort(touched[np.argsort(counts, kind="stable")[:max(round(cfg.cold_pool * len(touched)), 1)]])


def _cold_parts(dataset: Dataset, cold: np.ndarray, valid_cold: np.ndarray) -> np.ndarray:
    part_of_item = np.zeros(dataset.num_items, np.int8)
    part_of_item[valid_cold] = 1
    part_of_item[cold] = 2
    return part_of_item[dataset.interactions.item]


def _listed_items(dataset: Dataset, path: pathlib.Path) -> np.ndarray:
    rows = {item: row for row, item in enumerate(dataset.item_ids)}
    ids = read_ids(path)
    header = int(ids[0] == "item_id" and "item_id" not in rows)
    if len(ids) == header:
        raise KgrecError(f"{path}: found a header and no item, expected one item id a line; add the cold items")
    for line, item in enumerate(ids[header:], 1 + header):
        if item not in rows:
            raise KgrecError(f"{path}:{line}: found the item {item!r}, expected an item of {dataset.name}; remove the "
                             "line")
    return np.array([rows[item] for item in ids[header:]], np.int32)


def _leave_last_out(dataset: Dataset, cfg: SplitConfig) -> np.ndarray:
    log = dataset.interactions
    order = np.argsort(log.timestamp, kind="stable")  # equal times: by row
    num_test, num_valid = (np.ones_like if share > 0 else np.zeros_like for share in (cfg.test_share, cfg.valid_share))
    return _cut_users(log, dataset.num_users, order, num_test, num_valid)


def _by_time(dataset: Dataset, cfg: SplitConfig) -> np.ndarray:
    """What happened in one second stays together: a part begins where its first timestamp does."""
    times = dataset.interactions.timestamp
    ordered = np.sort(times)

    def start(share: float) -> np.int64:
        first = len(ordered) - round(share * len(ordered))
        return ordered[first] if first < len(ordered) else ordered[-1] + 1

    test, valid = start(cfg.test_share), start(cfg.test_share + cfg.valid_share)
    return np.where(times >= test, 2, np.where(times >= valid, 1, 0)).astype(np.int8)


def _fixed(dataset: Dataset, cfg: SplitConfig) -> np.ndarray:
    part = dataset.part.copy()
    if not dataset.has_fixed_valid and cfg.valid_share > 0:
        train = np.flatnonzero(part == 0)
        part[train] = _cut_randomly(dataset.interactions.take(train), dataset.num_users, cfg, 0.0, cfg.valid_share)
    return part


def save_split(split: Split, dataset: Dataset, path: pathlib.Path | str) -> None:
    """Freeze a split, atomically: {train,valid,test}.tsv with the data set's ids, split.json with both hashes."""
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = target.with_name(f"{target.name}.tmp{os.getpid()}")
    folder.mkdir()
    try:
        users, items = list(dataset.user_ids), list(dataset.item_ids)
        parts = {name: getattr(split, name) for name in PARTS}
        for name, rows in parts.items():
            columns = {"user_id": Coded(rows.user, users), "item_id": Coded(rows.item, items),
                       "rating": rows.rating, "timestamp": rows.timestamp}
            write_tsv(folder / f"{name}.tsv", columns)
        about = {"format_version": 1, "kind": split.kind, "valid_given": split.valid_given,
                 "split_sha256": split.content_hash(), "data_sha256": dataset.content_hash(),
                 "interactions": {name: len(rows) for name, rows in parts.items()},
                 "cold_items": [items[i] for i in split.cold_items],
                 "valid_cold_items": [items[i] for i in split.valid_cold_items]}
        (folder / "split.json").write_text(json.dumps(about, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        if target.is_dir():
            raise KgrecError(f"{target}: found a split there already, expected none; remove it to cut anew")
        os.replace(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def load_split(path: pathlib.Path | str, dataset: Dataset) -> Split:
    """The split that `save_split` froze; an error where it does not belong to this data set or was changed since."""
    folder = pathlib.Path(path)
    try:
        about = json.loads((folder / "split.json").read_text(encoding="utf-8"))
        data_hash, split_hash, counts = about["data_sha256"], about["split_sha256"], about["interactions"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise KgrecError(f"{folder / 'split.json'}: found no readable split ({type(error).__name__}), expected what "
                         f"kgrec wrote; remove the run folder") from None
    if data_hash != dataset.content_hash():
        raise KgrecError(f"{folder / 'split.json'}: found the split of other data than {dataset.name} (its SHA-256 "
                         f"begins {data_hash[:12]}), expected the same content; use a new run folder")
    users = {u: row for row, u in enumerate(dataset.user_ids)}
    items = {i: row for row, i in enumerate(dataset.item_ids)}
    parts = {n: _load_part(folder / f"{n}.tsv", users, items) if counts[n] else Interactions.empty() for n in PARTS}
    split = Split(about["kind"], parts["train"], parts["valid"], parts["test"], about["valid_given"],
                  np.array([items[i] for i in about["cold_items"]], np.int32),
                  np.array([items[i] for i in about["valid_cold_items"]], np.int32))
    if split.content_hash() != split_hash:
        raise KgrecError(f"{folder}: found a split that was changed after it was frozen (SHA-256 "
                         f"{split.content_hash()[:12]}, expected {split_hash[:12]}); remove the run folder, or restore "
                         "its files")
    return split


def _load_part(path: pathlib.Path, users: dict[str, int], items: dict[str, int]) -> Interactions:
    table = read_table(path, {"user_id": "id", "item_id": "id", "rating": "float", "timestamp": "int"})
    columns = []
    for name, rows in (("user_id", users), ("item_id", items)):
        unknown = [v for v in table[name].values if v not in rows]
        if unknown:
            raise KgrecError(f"{path}: found the {name} {unknown[0]!r}, expected one of the data set; restore the file")
        columns.append(np.array([rows[v] for v in table[name].values], np.int32)[table[name].codes])
    return Interactions(*columns, table["rating"].astype(np.float32), table["timestamp"])
