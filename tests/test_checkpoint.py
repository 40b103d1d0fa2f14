"""Trees to disk and back: whole, in part, onto other meshes, and the errors."""

import os
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from kgrec_jax.checkpoint import Checkpoints, load_part, load_tree, save_tree
from kgrec_jax.errors import KgrecError
from kgrec_jax.sharding import MeshConfig, make_mesh


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def tree():
    return {"encoder": {"layer": {"0": {"kernel": jnp.arange(32.0).reshape(8, 4)}}, "low": jnp.ones(3, jnp.bfloat16)},
            "relation": np.arange(6, dtype=np.int32), "scale": np.float32(0.1),
            "list": [jnp.zeros(2), np.ones(1)], "n": 7}


def assert_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        assert np.asarray(a).dtype == np.asarray(b).dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_a_tree_comes_back_as_numpy_and_replaces_an_older_one(tmp_path):
    save_tree(tmp_path / "a" / "tables", {"old": np.ones(3)})
    save_tree(tmp_path / "a" / "tables", tree())
    got = load_tree(tmp_path / "a" / "tables")
    assert_equal(got, tree())
    assert isinstance(got["encoder"]["layer"]["0"]["kernel"], np.ndarray)
    assert os.listdir(tmp_path / "a") == ["tables"]


def test_onto_another_mesh(tmp_path):
    def on(mesh, spec):
        return NamedSharding(make_mesh(mesh), spec)

    x = jax.device_put(jnp.arange(64.0).reshape(16, 4), on(MeshConfig(2, 4), P("model", None)))
    save_tree(tmp_path / "t", {"x": x, "y": jnp.ones(2)})
    where = on(MeshConfig(8, 1), P("data", None))
    got = load_tree(tmp_path / "t", {"x": jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=where),
                                     "y": jax.ShapeDtypeStruct((2,), jnp.float32)})
    assert got["x"].sharding == where
    np.testing.assert_array_equal(got["x"], x)


def test_a_part_for_the_next_stage(tmp_path):
    save_tree(tmp_path / "t", tree())
    want = {"encoder": {"layer": tree()["encoder"]["layer"]}}
    assert_equal(load_part(tmp_path / "t", want), want)


@pytest.mark.parametrize("abstract,words", [
    ({"encoder": {"layer": {"0": {"kernel": jnp.zeros((8, 5))}}}}, ("encoder/layer/0/kernel", "(8, 4)", "(8, 5)")),
    ({"decoder": jnp.zeros(3)}, ("decoder is missing",))])
def test_a_part_that_is_not_there(tmp_path, abstract, words):
    save_tree(tmp_path / "t", tree())
    with pytest.raises(KgrecError) as error:
        load_part(tmp_path / "t", abstract)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_a_whole_tree_has_nothing_extra(tmp_path):
    save_tree(tmp_path / "t", {"a": jnp.ones(2), "b": jnp.ones(3)})
    with pytest.raises(KgrecError, match="b is not expected"):
        load_tree(tmp_path / "t", {"a": jnp.ones(2)})
    for missing in (tmp_path / "none", tmp_path):
        with pytest.raises(KgrecError, match="found no checkpoint"):
            load_tree(missing)


def test_a_kill_during_a_save_leaves_the_last_whole_one(tmp_path):
    state = {"params": {"w": jnp.ones((8, 2))}, "opt_state": optax.adam(0.1).init({"w": jnp.ones((8, 2))})}
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest is None
        checkpoints.save(3, state, {"position": 3, "best": None, "x": 0.1})
    (tmp_path / "5.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest == 3
        assert checkpoints.load_meta(3) == {"position": 3, "best": None, "x": 0.1}
        assert_equal(checkpoints.load(3, state), state)
        checkpoints.save(5, state, {})
        checkpoints.wait()
        assert checkpoints.latest == 5
    part = {"params": state["params"]}
    assert_equal(load_part(tmp_path, part), part)  # of the whole folder: its latest


def test_the_latest_and_the_best_are_kept(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for step, best in ((1, 1), (2, 2), (3, 2), (4, 2)):
            checkpoints.save(step, {"w": jnp.full(2, float(step))}, {}, best_step=best)
        checkpoints.wait()
        assert float(checkpoints.load(2, {"w": jnp.zeros(2)})["w"][0]) == 2.0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "4"]


def test_a_state_may_be_given_away_while_it_is_written(tmp_path):
    step = jax.jit(lambda w: w + 1.0, donate_argnums=0)
    w = jnp.zeros((512, 512))
    with Checkpoints(tmp_path) as checkpoints:
        for number in range(1, 4):
            w = step(w)
            checkpoints.save(number, {"w": w}, {}, best_step=2)
            for _ in range(20):
                w = step(w)
        checkpoints.wait()
        for number, value in ((2, 22.0), (3, 43.0)):
            got = checkpoints.load(number, {"w": jnp.zeros((512, 512))})["w"]
            assert (got == value).all()
