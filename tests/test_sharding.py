"""The mesh, the rules, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from kgrec_jax.errors import KgrecError
from kgrec_jax.sharding import (REPLICATED, TABLE, MeshConfig, active_mesh, constrain, make_mesh, padded_rows, put,
                                put_batch, shardings)

RULES = ((r"entity/embedding$", TABLE), (r"dense/kernel$", P(None, "model")), (r".*", P()))


@pytest.mark.parametrize("cfg,shape", [
    (MeshConfig(), (8, 1)), (MeshConfig(-1, 4), (2, 4)), (MeshConfig(2, -1), (2, 4)), (MeshConfig(4, 2), (4, 2))])
def test_the_mesh_uses_what_exists(cfg, shape):
    mesh = make_mesh(cfg)
    assert mesh.axis_names == ("data", "model") and mesh.devices.shape == shape


@pytest.mark.parametrize("cfg,words", [
    (MeshConfig(3, 1), ("data=3", "8 devices")), (MeshConfig(-1, 3), ("model=3", "8 devices")),
    (MeshConfig(-1, -1), ("at most one",)), (MeshConfig(0, 8), ("data=0",)),
    (MeshConfig(-1, 16), ("model=16", "8 devices"))])
def test_a_mesh_that_does_not_fit(cfg, words):
    with pytest.raises(KgrecError) as error:
        make_mesh(cfg)
    assert all(word in str(error.value) for word in words)


def test_first_match_wins_and_moments_follow_their_parameters():
    mesh = make_mesh(MeshConfig(2, 4))
    params = {"entity": {"embedding": jnp.zeros((64, 4))}, "dense": {"kernel": jnp.zeros((4, 8)), "bias": jnp.zeros(8)}}
    state = {"params": params, "opt_state": jax.eval_shape(optax.adam(0.1).init, params)}
    specs = jax.tree.map(lambda s: s.spec, shardings(state, mesh, RULES))
    for tree in (specs["params"], specs["opt_state"][0].mu, specs["opt_state"][0].nu):
        assert tree["entity"]["embedding"] == TABLE
        assert tree["dense"] == {"kernel": P(None, "model"), "bias": P()}
    assert specs["opt_state"][0].count == P()
    placed = put(params, shardings(params, mesh, RULES))
    assert placed["entity"]["embedding"].addressable_shards[0].data.shape == (8, 4)


@pytest.mark.parametrize("tree,rules,words", [
    ({"entity": {"embedding": np.zeros((60, 4))}}, RULES, ("entity/embedding", "(60, 4)", "data", "padded_rows")),
    ({"entity": {"embedding": np.zeros(64)}}, RULES, ("entity/embedding", "(64,)", "2 dimensions")),
    ({"a": np.zeros(3)}, RULES[:1], ("a (3,)", ".*"))])
def test_rules_that_do_not_fit(tree, rules, words):
    with pytest.raises(KgrecError) as error:
        shardings(tree, make_mesh(MeshConfig()), rules)
    assert all(word in str(error.value) for word in words)


def test_padded_rows():
    assert [padded_rows(n, 1) for n in (0, 1, 8, 9)] == [8, 8, 8, 16]
    assert padded_rows(30522, make_mesh(MeshConfig())) == 30528 and 30528 % 64 == 0


def test_a_batch_is_cut_over_the_data_axis():
    mesh = make_mesh(MeshConfig(4, 2))
    batch = put_batch({"ids": np.arange(8, dtype=np.int32), "x": np.ones((8, 3), np.float32), "count": 5}, mesh)
    assert batch["ids"].sharding.spec == P("data") and batch["count"].sharding.spec == P()
    np.testing.assert_array_equal(batch["ids"], np.arange(8))
    with pytest.raises(KgrecError, match=r"batch field ids: found 6 rows, expected a multiple of the 4 devices"):
        put_batch({"ids": np.arange(6)}, mesh)


def test_constrain_is_a_no_op_without_a_mesh_and_where_it_does_not_fit():
    mesh = make_mesh(MeshConfig(2, 4))
    f = jax.jit(lambda x: constrain(x, "data", "model") * 2)
    assert active_mesh() is None and float(f(jnp.ones((2, 4))).sum()) == 16
    with jax.set_mesh(mesh):
        assert active_mesh().size == 8
        assert f(jnp.ones((4, 8))).sharding.spec == P("data", "model")
        assert float(f(jnp.ones((3, 4))).sum()) == 24
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        assert active_mesh() is None


def test_replicated_rules_fit_everything():
    tree = {"a": np.zeros((3, 5)), "b": np.float32(1)}
    assert all(s.is_fully_replicated for s in jax.tree.leaves(shardings(tree, make_mesh(MeshConfig()), REPLICATED)))
