"""Splits: every interaction in one part, shares as promised, cold items gone from training, frozen and verified."""

import dataclasses

import numpy as np
import pytest

from kgrec_jax.data.dataset import Dataset, Graph, Interactions
from kgrec_jax.data.interactions import SplitConfig, load_split, make_split, save_split
from kgrec_jax.data.toy import toy_world
from kgrec_jax.errors import KgrecError

WORLD = toy_world(seed=1, num_users=60, num_items=50)


def pairs(part: Interactions) -> set[tuple[int, int]]:
    return set(zip(part.user.tolist(), part.item.tolist(), strict=True))


def small(users, items, times=None, part=None, valid=False) -> Dataset:
    """A data set of a log alone."""
    n, num_items = len(users), max(items) + 1
    ids = tuple(f"i{i}" for i in range(num_items))
    log = Interactions(np.array(users, np.int32), np.array(items, np.int32), np.ones(n, np.float32),
                       np.array(times if times is not None else np.zeros(n), np.int64))
    graph = Graph(ids, ids, ids, (), (), np.zeros((0, 3), np.int32), num_items, np.zeros(0, np.int8))
    return Dataset("small", tuple(f"u{u}" for u in range(max(users) + 1)), ids, ids, ids, log,
                   np.array(part if part is not None else np.zeros(n), np.int8), part is not None, valid, times is not None,
                   False, graph, {})


@pytest.mark.parametrize("cfg", [SplitConfig(), SplitConfig("leave-last-out"), SplitConfig("time"), SplitConfig("cold-items"),
                                 SplitConfig("random", cold_share=0.1), SplitConfig("random", valid_share=0, test_share=0.3)],
                         ids=lambda cfg: f"{cfg.kind}-{cfg.cold_share}-{cfg.test_share}")
def test_parts_make_up_the_log_and_repeat_with_the_seed(cfg):
    split = make_split(WORLD, cfg)
    parts = [pairs(split.train), pairs(split.valid), pairs(split.test)]
    assert sum(map(len, parts)) == len(WORLD.interactions) and set.union(*parts) == pairs(WORLD.interactions)
    assert len(split.test) and (len(split.valid) > 0) == (cfg.valid_share > 0) and not split.valid_given
    assert pairs(split.fit) == parts[0] | parts[1]
    assert make_split(WORLD, cfg).content_hash() == split.content_hash()
    other = make_split(WORLD, dataclasses.replace(cfg, seed=7)).content_hash()
    assert (other == split.content_hash()) == (cfg.kind in ("leave-last-out", "time"))


def test_random_cuts_shares_of_each_user():
    users = np.repeat([0, 1, 2, 3, 4], [40, 10, 3, 2, 1])
    items = np.concatenate([np.arange(n) for n in (40, 10, 3, 2, 1)])
    split = make_split(small(users.tolist(), items.tolist()), SplitConfig())
    counts = [np.bincount(part.user, minlength=5).tolist() for part in (split.train, split.valid, split.test)]
    assert counts == [[32, 8, 1, 2, 1], [4, 1, 1, 0, 0], [4, 1, 1, 0, 0]]  # fewer than three: all in train


def test_cold_items_leave_training_altogether(tmp_path):
    split = make_split(WORLD, SplitConfig("random", cold_share=0.1))
    touched = len(np.unique(WORLD.interactions.item))
    assert len(split.cold_items) == len(split.valid_cold_items) == round(0.1 * touched)
    assert not np.isin(split.train.item, np.concatenate([split.cold_items, split.valid_cold_items])).any()
    assert not np.isin(split.valid.item, split.cold_items).any() and not np.isin(split.test.item, split.valid_cold_items).any()
    assert (~np.isin(split.test.item, split.cold_items)).any()  # and the warm rest is cut as ever

    listed = tmp_path / "cold.txt"
    listed.write_text("film3\nfilm7\n")
    split = make_split(WORLD, SplitConfig("cold-items", items=str(listed)))
    assert split.cold_items.tolist() == [3, 7] and len(split.valid_cold_items) == 2
    assert set(split.test.item.tolist()) <= {3, 7}
    assert set(split.valid.item.tolist()) == set(split.valid_cold_items.tolist())
    assert not np.isin(split.train.item, [3, 7, *split.valid_cold_items]).any()
    listed.write_text("item_id\nfilm3\n")  # a header is no item
    assert make_split(WORLD, SplitConfig("cold-items", items=str(listed))).cold_items.tolist() == [3]


def test_last_and_time():
    data = small([0, 0, 0, 0, 1, 1], [0, 1, 2, 3, 0, 1], times=[40, 10, 30, 20, 1, 2])
    split = make_split(data, SplitConfig("leave-last-out"))
    assert pairs(split.test) == {(0, 0)} and pairs(split.valid) == {(0, 2)} and len(split.train) == 4
    data = small([0] * 10, list(range(10)), times=[1, 2, 3, 4, 5, 6, 7, 8, 8, 8])
    split = make_split(data, SplitConfig("time", valid_share=0.1, test_share=0.1))
    assert split.test.timestamp.tolist() == [8, 8, 8]  # one second is never cut in two
    assert split.train.timestamp.max() < split.test.timestamp.min()


def test_fixed_parts_and_what_is_given_back():
    users, items = [0] * 6 + [1] * 5, [*range(6), *range(5)]
    given = make_split(small(users, items, part=[0, 0, 0, 1, 2, 2, 0, 0, 0, 1, 2], valid=True), SplitConfig())
    assert given.kind == "fixed" and given.valid_given and given.fit_on == "train"
    assert pairs(given.valid) == {(0, 3), (1, 3)} and pairs(given.fit) == pairs(given.train)
    cut = make_split(small(users, items, part=[0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 2]), SplitConfig())
    assert not cut.valid_given and cut.fit_on == "train+valid" and len(cut.valid) == 2
    assert pairs(cut.test) == {(0, 4), (0, 5), (1, 4)}
    again = make_split(small(users, items, part=[0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 2]), SplitConfig("random"))
    assert again.kind == "random"


def test_a_frozen_split_is_verified(tmp_path):
    split = make_split(WORLD, SplitConfig("random", cold_share=0.1, seed=5))
    save_split(split, WORLD, tmp_path / "split")
    loaded = load_split(tmp_path / "split", WORLD)
    assert loaded.content_hash() == split.content_hash() and loaded.kind == "random"
    for name in ("train", "valid", "test"):
        for field in ("user", "item", "rating", "timestamp"):
            a, b = getattr(getattr(split, name), field), getattr(getattr(loaded, name), field)
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype
    np.testing.assert_array_equal(loaded.cold_items, split.cold_items)
    with pytest.raises(KgrecError, match="found a split there already"):
        save_split(split, WORLD, tmp_path / "split")
    with pytest.raises(KgrecError, match="the split of other data"):
        load_split(tmp_path / "split", toy_world(seed=2, num_users=60, num_items=50))
    path = tmp_path / "split" / "test.tsv"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")
    with pytest.raises(KgrecError, match="changed after it was frozen"):
        load_split(tmp_path / "split", WORLD)
    (tmp_path / "split" / "split.json").write_text("{}")
    with pytest.raises(KgrecError, match="no readable split"):
        load_split(tmp_path / "split", WORLD)
    assert [p.name for p in tmp_path.iterdir()] == ["split"]


def test_empty_parts_freeze_too(tmp_path):
    split = make_split(WORLD, SplitConfig(valid_share=0))
    save_split(split, WORLD, tmp_path / "split")
    assert len(load_split(tmp_path / "split", WORLD).valid) == 0


PLAIN = small([0, 0, 0, 1], [0, 1, 2, 0])
BAD = {
    "shares": (WORLD, SplitConfig(valid_share=0.6, test_share=0.5), "left for training"),
    "negative share": (WORLD, SplitConfig(test_share=-0.1), "data.split.test_share: found -0.1"),
    "no timestamps": (PLAIN, SplitConfig("leave-last-out"), "has no timestamps"),
    "no timestamps, time": (PLAIN, SplitConfig("time"), "has no timestamps"),
    "no fixed split": (PLAIN, SplitConfig("fixed"), "has no train.tsv and test.tsv"),
    "list for random": (PLAIN, SplitConfig("random", items="cold.txt"), "expected --data.split.kind cold-items"),
    "cold share for time": (WORLD, SplitConfig("time", cold_share=0.1), "expected 0, or kind random or cold-items"),
    "absent list": (PLAIN, SplitConfig("cold-items", items="absent.txt"), "absent.txt: found no such file"),
    "nobody has three": (small([0, 1], [0, 1]), SplitConfig(), "no interaction to test on"),
    "nothing": (dataclasses.replace(WORLD, interactions=Interactions.empty()), SplitConfig(), "found no interactions"),
}


@pytest.mark.parametrize("data, cfg, message", BAD.values(), ids=BAD)
def test_bad_config_is_one_line(data, cfg, message):
    with pytest.raises(KgrecError) as error:
        make_split(data, cfg)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text, message", [("i0\nzz\n", "cold.txt:2: found the item "
                                            "'zz'"), ("i0\ni0\n", "cold.txt:2: found 'i0'"),
                                           ("i0\n\ni1\n", "cold.txt:2: found an empty "
                                            "line"), ("", "cold.txt:1: found an empty line"),
                                           ("item_id\n", "found a header and no item"),
                                           ("i0\ni1\ni2\n", "no interaction left to train on")])
def test_bad_list_of_cold_items(tmp_path, text, message):
    (tmp_path / "cold.txt").write_text(text)
    with pytest.raises(KgrecError) as error:
        make_split(PLAIN, SplitConfig("cold-items", items=str(tmp_path / "cold.txt")))
    assert message in str(error.value)


def test_the_given_lists_of_real_data(shared):
    from kgrec_jax.data.folder import DataConfig, read_folder

    folder = shared / "data" / "movietweetings-10core"
    split = make_split(read_folder(folder, DataConfig()), SplitConfig("cold-items", items=str(folder / "cold_items.txt")))
    assert len(split.cold_items) == len(split.valid_cold_items) == 181


def test_cold_items_can_be_drawn_from_the_least_touched():
    dataset = toy_world()
    counts = np.bincount(dataset.interactions.item, minlength=dataset.num_items)
    split = make_split(dataset, SplitConfig(kind="random", cold_share=0.1, cold_pool=0.3))
    drawn = np.concatenate([split.cold_items, split.valid_cold_items])
    touched = np.sort(counts[counts > 0])
    assert len(drawn) == 2 * round(0.1 * len(touched))
    assert counts[drawn].max() <= touched[round(0.3 * len(touched)) - 1]
    with pytest.raises(KgrecError, match="cold_pool"):
        make_split(dataset, SplitConfig(kind="random", cold_share=0.2, cold_pool=0.3))
