"""A log of any size that a model of taste can be learned from: few items are touched by many, and users have topics.

Items have a topic each and a popularity of their own, rank^-EXPONENT. A user has a few topics and draws most of its
items from them, in proportion to popularity, the others from all items. It is written a block of users at a time, so
memory is a block and the items whatever the length of the log.
"""

from __future__ import annotations

import os
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.csv

from kgrec_jax.errors import KgrecError

EXPONENT = 0.8  # of popularity by rank
SHARES = (0.4, 0.2, 0.15, 0.1)  # of a user's draws from each of its topics; what is left is drawn from all items
LEAST = 5  # items of a user
_BLOCK = 1 << 20  # interactions that are drawn and written together, about
_BEGAN, _SPAN = 1_600_000_000, 3 * 365 * 86_400  # timestamps: seconds


def write_log(path: pathlib.Path, users: int, items: int, interactions: int, seed: int = 0) -> None:
    """Writes `interactions.tsv` with exactly so many rows, each pair of user and item once; whole or not at all.

    Users' rows stand near one another and in no order. Raises KgrecError for sizes that no such log has.
    """
    if not LEAST * users <= interactions <= users * items // 10:
        raise KgrecError(f"--interactions: found {interactions:,} of {users:,} users and {items:,} items, expected "
                         f"from {LEAST} a user to a tenth of all pairs, {LEAST * users:,} to {users * items // 10:,}")
    taste = _Taste(items, np.random.default_rng((seed, 0)))
    lengths = _lengths(users, items, interactions, np.random.default_rng((seed, 1)))
    ids = pa.array([f"i{row}" for row in range(items)], pa.string())
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    schema = pa.schema([("user_id", pa.string()), ("item_id", pa.string()), ("timestamp", pa.int64())])
    options = pa.csv.WriteOptions(delimiter="\t", quoting_style="none", quoting_header="none")
    ends = np.cumsum(lengths)
    try:
        with pa.csv.CSVWriter(temporary, schema, write_options=options) as writer:
            first = 0
            while first < users:
                before = int(ends[first - 1]) if first else 0
                stop = max(first + 1, int(np.searchsorted(ends, before + _BLOCK, side="right")))
                rng = np.random.default_rng((seed, 2, first))
                user, item = taste.draw(lengths[first:stop], rng)
                names = pa.array([f"u{row}" for row in range(first, stop)], pa.string())
                when = _BEGAN + rng.integers(_SPAN, size=len(user))
                columns = [names.take(pa.array(user)), ids.take(pa.array(item)), pa.array(when)]
                writer.write_table(pa.table(columns, schema=schema))
                first = stop
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _lengths(users: int, items: int, interactions: int, rng: np.random.Generator) -> np.ndarray:
    """[Nu] items of each user, log-normal above LEAST and at most a quarter of all; they add up exactly."""
    weight = rng.lognormal(0.0, 1.0, users)
    out = np.full(users, LEAST, np.int64)
    most = max(LEAST, items // 4)
    while left := interactions - int(out.sum()):
        free = out < most
        more = np.floor(left * np.where(free, weight, 0.0) / weight[free].sum()).astype(np.int64)
        if not more.any():  # what rounding left
            more[rng.permutation(np.flatnonzero(free))[:left]] = 1
        out = np.minimum(out + more, most)
    return out


class _Taste:
    """Which items there are, and how users draw them."""

    def __init__(self, items: int, rng: np.random.Generator):
        self.items, self.topics = items, max(4, min(200, items // 40))
        popularity = (1.0 + rng.permutation(items)) ** -EXPONENT
        topic = rng.integers(self.topics, size=items)
        self.by_topic = np.argsort(topic, kind="stable")  # items, those of a topic together
        self.sums = np.concatenate([[0.0], np.cumsum(popularity[self.by_topic])])
        self.edges = np.searchsorted(topic[self.by_topic], np.arange(self.topics + 1))

    def draw(self, lengths: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """(user, item), each [Σ lengths], of users numbered from 0, shuffled."""
        topics = rng.integers(self.topics, size=(len(lengths), len(SHARES)))
        keys, enough, wanted, tries = np.zeros(0, np.int64), [], lengths, 0
        while (missing := wanted - np.bincount(keys // self.items, minlength=len(lengths))).max() > 0:
            missing = np.maximum(missing, 0)
            waits = (missing > 0)[keys // self.items]  # only users who lack something are sorted again
            keys, wanted, enough = keys[waits], np.where(missing > 0, wanted, 0), [*enough, keys[~waits]]
            user = np.repeat(np.arange(len(lengths)), missing + missing // 3 + (missing > 0))
            if tries < 8:
                item = self._tasted(topics[user], rng)
            else:  # a small topic may be used up
                item = rng.integers(self.items, size=len(user))
            keys, tries = np.union1d(keys, user * self.items + item), tries + 1
        keys = np.sort(np.concatenate([*enough, keys]))
        user = keys // self.items
        order = np.lexsort((rng.random(len(keys)), user))  # some of those drawn too many are dropped, any of them
        starts = np.searchsorted(user, np.arange(len(lengths)))
        kept = order[np.arange(len(keys)) - starts[user[order]] < lengths[user[order]]]
        keys = keys[rng.permutation(kept)]
        return keys // self.items, keys % self.items

    def _tasted(self, topics: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """[n] items of draws by users with topics [n, len(SHARES)]."""
        which = np.searchsorted(np.cumsum(SHARES), rng.random(len(topics)), side="right")
        topic = topics[np.arange(len(topics)), np.minimum(which, len(SHARES) - 1)]
        anywhere = which == len(SHARES)
        low = np.where(anywhere, 0.0, self.sums[self.edges[topic]])
        high = np.where(anywhere, self.sums[-1], self.sums[self.edges[topic + 1]])
        place = np.searchsorted(self.sums, low + rng.random(len(topics)) * (high - low), side="right") - 1
        return self.by_topic[np.minimum(place, self.items - 1)]
