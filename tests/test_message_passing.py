"""Sums over edges and their gradients against SciPy and dense products, on one device and on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp

from kgrec_jax.models import message_passing
from kgrec_jax.models.message_passing import attend, edge_dot, make_links, propagate
from kgrec_jax.sharding import make_mesh


def drawn(num_edges=60, num_targets=9, num_sources=13, width=5, seed=0):
    """(links, target [E], source [E], x [Ns, D], weights [E]); target 4 and source 2 have no edge, one is double."""
    rng = np.random.default_rng(seed)
    target, source = rng.integers(0, num_targets, num_edges), rng.integers(0, num_sources, num_edges)
    target[target == 4], source[source == 2] = 5, 3
    target[1], source[1] = target[0], source[0]
    order = np.argsort(target, kind="stable")
    target, source = target[order], source[order]
    links = jax.tree.map(jnp.asarray, make_links(target, source, num_targets, num_sources))
    x = rng.standard_normal((num_sources, width)).astype(np.float32)
    return links, target, source, x, rng.standard_normal(num_edges).astype(np.float32)


def dense(weights, target, source, shape):
    """The matrix [Nd, Ns] of the edges."""
    return jnp.zeros(shape).at[target, source].add(weights)


def by_segments(monkeypatch):
    """Every backend takes the other backends' way."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, cpu, default: default(*args))


@pytest.mark.parametrize("other_backend", [False, True])
def test_sums_and_gradients_are_those_of_the_matrix(monkeypatch, other_backend):
    if other_backend:
        by_segments(monkeypatch)
    links, target, source, x, weights = drawn()
    shape = links.num_targets, links.num_sources
    expected = sp.csr_matrix((weights, (target, source)), shape=shape) @ x
    np.testing.assert_allclose(jax.jit(propagate)(links, x, weights), expected, rtol=1e-5, atol=1e-6)
    ones = sp.csr_matrix((np.ones(len(target), np.float32), (target, source)), shape=shape)
    np.testing.assert_allclose(propagate(links, x), ones @ x, rtol=1e-5, atol=1e-6)
    assert not np.asarray(propagate(links, x, weights))[4].any()
    bend = jnp.asarray(np.random.default_rng(1).standard_normal((shape[0], x.shape[1])), jnp.float32)

    def ours(x, weights):
        return (jnp.sin(propagate(links, x, weights)) * bend).sum() + (jnp.cos(propagate(links, x)) * bend).sum()

    def theirs(x, weights):
        return ((jnp.sin(dense(weights, target, source, shape) @ x) * bend).sum()
                + (jnp.cos(ones.toarray() @ x) * bend).sum())

    for got, wanted in zip(jax.jit(jax.grad(ours, (0, 1)))(x, weights), jax.grad(theirs, (0, 1))(x, weights)):
        np.testing.assert_allclose(got, wanted, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("chunk", [7, 4096])
def test_edge_dot_and_its_gradients_whatever_the_chunk(monkeypatch, chunk):
    monkeypatch.setattr(message_passing, "_DOT_CHUNK", chunk)
    links, target, source, b, _ = drawn()
    a = np.random.default_rng(2).standard_normal((links.num_targets, b.shape[1])).astype(np.float32)
    np.testing.assert_allclose(edge_dot(links, a, b), (a[target] * b[source]).sum(1), rtol=1e-5, atol=1e-6)
    ours = jax.grad(lambda a, b: jnp.sin(edge_dot(links, a, b)).sum(), (0, 1))(a, b)
    plain = jax.grad(lambda a, b: jnp.sin((a[target] * b[source]).sum(1)).sum(), (0, 1))
    for got, wanted in zip(ours, plain(jnp.asarray(a), jnp.asarray(b))):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def attend_by_hand(target, source, logits, x, present, num_targets):
    out = np.zeros((num_targets, x.shape[1]))
    for i in range(num_targets):
        mine = (target == i) & present[source]
        if mine.any():
            raised = np.exp(logits[mine].astype(np.float64) - logits[mine].max())
            out[i] = raised @ x[source[mine]] / raised.sum()
    return out


def test_attention_is_a_softmax_over_the_edges_that_are_there():
    links, target, source, x, logits = drawn()
    present = np.ones(links.num_sources, bool)
    present[[3, 7]] = False
    for scale in (1.0, 1e4):  # logits that exp would overflow by far
        found = np.asarray(jax.jit(attend)(links, scale * logits, x, present[source]))
        wanted = attend_by_hand(target, source, scale * logits, x, present, links.num_targets)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    nobody = np.zeros(links.num_sources, bool)
    assert not np.asarray(attend(links, logits, x, nobody[source])).any()  # and no NaN
    grads = jax.jit(jax.grad(lambda l, x: jnp.square(attend(links, l, x, nobody[source])).sum(), (0, 1)))(1e4 * logits, x)
    assert all(np.isfinite(g).all() for g in grads)


def test_gradient_of_attention_is_that_of_a_masked_softmax():
    links, target, source, x, logits = drawn()
    present = np.arange(links.num_sources) != 3
    into = jnp.asarray((target[None] == np.arange(links.num_targets)[:, None]) & present[source][None])  # [Nd, E]

    def theirs(logits, x):
        shares = jnp.where(into, jax.nn.softmax(jnp.where(into, logits[None], -1e30), axis=1), 0.0)
        return jnp.sin(shares @ x[source]).sum()

    ours = jax.jit(jax.grad(lambda l, x: jnp.sin(attend(links, l, x, present[source])).sum(), (0, 1)))(logits, x)
    for got, wanted in zip(ours, jax.grad(theirs, (0, 1))(jnp.asarray(logits), jnp.asarray(x))):
        np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-5)


def test_no_edges_and_no_rows():
    links = make_links(np.zeros(0, int), np.zeros(0, int), 3, 4)
    x = jnp.ones((4, 2))
    assert not np.asarray(propagate(links, x)).any() and propagate(links, x).shape == (3, 2)
    assert edge_dot(links, jnp.ones((3, 2)), x).shape == (0,)
    assert not np.asarray(attend(links, jnp.zeros(0), x, np.zeros(0, bool))).any()
    assert not np.asarray(jax.grad(lambda x: propagate(links, x).sum())(x)).any()


def test_bad_edges_are_refused():
    with pytest.raises(ValueError, match="not sorted"):
        make_links(np.array([1, 0]), np.array([0, 0]), 2, 1)
    with pytest.raises(ValueError, match="source of 0 to 3"):
        make_links(np.array([0, 1]), np.array([0, 3]), 2, 3)


def test_same_on_a_mesh_of_eight():
    links, target, source, x, weights = drawn(seed=3)
    alone = jax.jit(jax.value_and_grad(lambda x: jnp.sin(propagate(links, x, weights)).sum()))(jnp.asarray(x))
    with jax.set_mesh(make_mesh()):
        place = jax.sharding.NamedSharding(make_mesh(), jax.sharding.PartitionSpec())
        held, rows = jax.device_put(links, place), jax.device_put(x, place)
        many = jax.jit(jax.value_and_grad(lambda x, links: jnp.sin(propagate(links, x, weights)).sum()))(rows, held)
    for got, wanted in zip(many, alone):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
