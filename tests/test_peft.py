"""Adapters: nothing at first, a low-rank sum later, plain weights after merging."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kgrec_jax import KgrecError
from kgrec_jax.models import bert, peft

CONFIG = bert.BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
                         max_position_embeddings=8)
PARAMS = bert.init_encoder(CONFIG, jax.random.key(0))


def test_fresh_adapters_change_no_bit():
    lora = peft.lora_init(PARAMS, jax.random.key(1), 3)
    assert len(jax.tree.leaves(lora)) == 2 * 2 * 2  # a and b of query and value in two layers
    jax.tree.map(np.testing.assert_array_equal, jax.jit(peft.lora_merge, static_argnums=2)(PARAMS, lora, 16.0), PARAMS)


def test_merged_kernels_are_the_low_rank_sum_and_the_rest_is_untouched():
    fresh = peft.lora_init(PARAMS, jax.random.key(1), 2)
    lora = jax.tree.map(lambda x: jax.random.normal(jax.random.key(2), x.shape), fresh)
    merged = peft.lora_merge(PARAMS, lora, 5.0)
    adapter = lora["encoder"]["layer"]["1"]["attention"]["self"]["query"]["kernel"]
    before, after = (tree["encoder"]["layer"]["1"]["attention"]["self"] for tree in (PARAMS, merged))
    a, b, kernel = (np.asarray(x, np.float64) for x in (adapter["a"], adapter["b"], before["query"]["kernel"]))
    wanted = kernel + 2.5 * a @ b
    np.testing.assert_allclose(after["query"]["kernel"], wanted, rtol=1e-5, atol=1e-5)
    assert after["key"]["kernel"] is before["key"]["kernel"] and after["query"]["bias"] is before["query"]["bias"]
    assert jax.tree.structure(merged) == jax.tree.structure(PARAMS)


def test_the_first_gradient_moves_b_alone():
    lora = peft.lora_init(PARAMS, jax.random.key(1), 2, (r"intermediate/dense/kernel$",))
    ids = jnp.arange(6)[None]

    def total(lora):
        params = peft.lora_merge(PARAMS, lora, 2.0)
        states = bert.Bert(CONFIG).apply({"params": params}, ids, jnp.ones_like(ids), jnp.zeros_like(ids))
        return (states[-1] ** 3).sum()

    adapter = jax.grad(total)(lora)["encoder"]["layer"]["0"]["intermediate"]["dense"]["kernel"]
    assert np.abs(adapter["b"]).max() > 0 and not np.any(adapter["a"])


def test_bad_arguments():
    with pytest.raises(KgrecError, match="no parameter that nothing matches"):
        peft.lora_init(PARAMS, jax.random.key(0), 2, ("nothing",))
    for rank in (0, 9):
        with pytest.raises(KgrecError, match=f"lora_rank: found {rank} for encoder/layer/0"):
            peft.lora_init(PARAMS, jax.random.key(0), rank)
    with pytest.raises(KgrecError, match="of another encoder"):
        peft.lora_merge({"encoder": {}}, peft.lora_init(PARAMS, jax.random.key(0), 2), 1.0)


# --- every method ---------------------------------------------------------------------------------------------------

IDS = jnp.asarray(np.random.default_rng(0).integers(0, 20, (3, 6)), jnp.int32)
MASK = jnp.asarray([[1] * 6, [1] * 4 + [0] * 2, [1] * 2 + [0] * 4], jnp.int32)
TYPES = jnp.zeros_like(IDS).at[:, 3:].set(1)
SMALL = {"rank": 3, "target_rank": 2, "bottleneck": 3, "prefix_length": 4, "prompt_length": 2}


def of(method, **fields):
    return peft.PeftConfig(method=method, **{**SMALL, **fields})


def plain(params=PARAMS, soft_vectors=None, soft_positions=None):
    return bert.Bert(CONFIG).apply({"params": params}, IDS, MASK, TYPES, soft_vectors, soft_positions)


def states(cfg, trainable, params=PARAMS, **kwargs):
    # Not under jit: one by one, the operations are compiled once for all methods.
    return peft.hidden_states(cfg, CONFIG, params, trainable, IDS, MASK, TYPES, **kwargs)


def moved(tree, scale=0.3):
    """Every leaf somewhere else."""
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, [leaf + scale * jax.random.normal(jax.random.key(i), leaf.shape)
                                          for i, leaf in enumerate(leaves)])


@pytest.mark.parametrize("method", [m for m in peft.METHODS if m != "prompt"])
def test_a_fresh_tree_changes_no_output(method):
    cfg = of(method)
    trainable = peft.init(cfg, CONFIG, PARAMS, jax.random.key(1))
    for params in (PARAMS, peft.base(cfg, CONFIG, PARAMS)):  # with the given weights whole, and with each held once
        found = states(cfg, trainable, params)
        assert len(found) == CONFIG.num_hidden_layers + 1
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), found, plain(PARAMS))
    assert float(peft.penalty(cfg, trainable)) == pytest.approx(0, abs=1e-9)


def test_a_prompt_of_no_tokens_changes_no_bit_and_no_word_moves_for_one():
    none = of("prompt", prompt_length=0)
    tree = peft.init(none, CONFIG, PARAMS, jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, states(none, tree), plain(PARAMS))
    assert peft.merge(none, PARAMS, tree) is PARAMS
    cfg = of("prompt")
    prompt = peft.init(cfg, CONFIG, PARAMS, jax.random.key(1))["prompt"]
    ids, mask, types, vectors, places = peft.peft_hooks.with_prompt(prompt, IDS, MASK, TYPES, None, None)
    closed = bert.Bert(CONFIG).apply({"params": PARAMS}, ids, mask.at[:, 6:].set(0), types, vectors, places)
    np.testing.assert_allclose(closed[-1][:, :6], plain(PARAMS)[-1], atol=1e-6)
    opened = states(cfg, {"prompt": prompt})[-1]
    assert opened.shape == (3, 6, 8) and np.abs(opened - plain(PARAMS)[-1]).max() > 1e-3


def test_a_prompt_stands_beside_other_soft_tokens():
    soft = {"soft_vectors": jnp.ones((3, 1, 8)), "soft_positions": jnp.asarray([[1], [-1], [0]], jnp.int32)}
    cfg, tree = of("prompt", prompt_length=0), {"prompt": jnp.zeros((0, 8))}
    np.testing.assert_array_equal(states(cfg, tree, **soft)[-1], plain(PARAMS, **soft)[-1])
    both = states(of("prompt"), {"prompt": jnp.ones((2, 8))}, **soft)[-1]
    assert np.abs(both - states(of("prompt"), {"prompt": jnp.ones((2, 8))})[-1])[0].max() > 1e-3


@pytest.mark.parametrize("method", ["full", "frozen", "lora", "adalora", "layers", "bitfit"])
def test_merged_weights_are_the_same_function(method):
    cfg = of(method)
    trainable = moved(peft.init(cfg, CONFIG, PARAMS, jax.random.key(1)))
    merged = peft.merge(cfg, peft.base(cfg, CONFIG, PARAMS), trainable)
    assert jax.tree.structure(merged) == jax.tree.structure(PARAMS)
    found = states(cfg, trainable)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), found, plain(merged))
    assert (np.abs(found[-1] - plain(PARAMS)[-1]).max() > 1e-3) == (method != "frozen")


@pytest.mark.parametrize("method", ["houlsby", "prefix", "prompt"])
def test_what_no_weight_holds_cannot_be_merged(method):
    cfg = of(method)
    trainable = moved(peft.init(cfg, CONFIG, PARAMS, jax.random.key(1)))
    assert np.abs(states(cfg, trainable)[-1] - plain(PARAMS)[-1]).max() > 1e-3
    with pytest.raises(KgrecError, match=f"peft.method: found {method}, which cannot be merged"):
        peft.merge(cfg, PARAMS, trainable)


@pytest.mark.parametrize("method", ["houlsby", "prefix", "prompt"])
def test_every_method_learns_from_its_first_gradient_with_dropout(method):
    cfg = of(method)
    trainable = peft.init(cfg, CONFIG, PARAMS, jax.random.key(1))

    def loss(tree):
        found = peft.hidden_states(cfg, CONFIG, PARAMS, tree, IDS, MASK, TYPES, key=jax.random.key(2))
        return (found[-1] ** 3).sum() + peft.penalty(cfg, tree)

    grads = jax.grad(loss)(trainable)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert sum(np.abs(leaf).max() > 1e-6 for leaf in jax.tree.leaves(grads)) >= 1


def test_what_each_method_trains():
    config = bert.BertConfig(vocab_size=3000, hidden_size=384, num_hidden_layers=6, num_attention_heads=12,
                             intermediate_size=1536, max_position_embeddings=64)
    params = jax.eval_shape(lambda key: bert.init_encoder(config, key), jax.random.key(0))
    shares = {}
    for method in peft.METHODS:
        def fresh(params, key, cfg=peft.PeftConfig(method=method)):
            return peft.init(cfg, config, params, key)

        shares[method] = peft.share(params, jax.eval_shape(fresh, params, jax.random.key(0)))
    assert shares.pop("full") == 1 and shares.pop("frozen") == 0 and 0 < shares.pop("layers") < 0.2
    assert all(0 < value < 0.035 for value in shares.values()), shares  # a few per cent
    layers = peft.init(of("layers", frozen_layers=1), CONFIG, PARAMS, jax.random.key(0))["values"]
    assert list(layers) == ["encoder"] and list(layers["encoder"]["layer"]) == ["1"]
    assert peft.init(of("layers", frozen_layers=2), CONFIG, PARAMS, jax.random.key(0)) == {}
    bitfit = peft.init(of("bitfit"), CONFIG, PARAMS, jax.random.key(0))["values"]
    assert all(leaf.ndim == 1 for leaf in jax.tree.leaves(bitfit)) and "word_embeddings" not in bitfit["embeddings"]


def test_allocation_keeps_the_important_ranks_within_the_budget():
    cfg = of("adalora", start_share=0.1, settle_share=0.4, every=2)
    trainable = peft.init(cfg, CONFIG, PARAMS, jax.random.key(1))
    number = len([x for x in jax.tree.leaves(trainable) if x.ndim == 1])
    tx, steps = peft.optimizer(cfg, optax.adam(0.05), 20), 20
    target = jax.random.normal(jax.random.key(3), (3, 6, 8))

    @jax.jit
    def step(tree, state):
        def loss(tree):
            return ((states(cfg, tree)[-1] - target) ** 2).mean() + peft.penalty(cfg, tree)

        value, grads = jax.value_and_grad(loss)(tree)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(grads, state, tree)
            return optax.apply_updates(tree, updates), state, value

    with jax.numpy_dtype_promotion("standard"):
        state = tx.init(trainable)
    values, alive = [], []
    for _ in range(steps):
        trainable, state, value = step(trainable, state)
        values.append(float(value))
        alive.append(peft.peft_lowrank.ranks(trainable))
    assert sum(alive[1]) == 3 * number  # nothing is pruned before the start
    assert sum(alive[-1]) == 2 * number and len(set(alive[-1])) > 1  # the target on average, not everywhere the same
    assert alive[-1] == alive[-4] == alive[12]  # settled
    assert values[-1] < values[0]
    allowed = [int(peft.peft_lowrank.budget(jnp.asarray(t), 30, 20, 2, 12)) for t in (0, 2, 7, 12, 20)]
    assert allowed == [30, 30, 21, 20, 20]


@pytest.mark.parametrize("fields, said", [
    ({"method": "nothing"}, "peft.method: found 'nothing'"), ({"rank": 9}, "peft.rank: found 9, expected 1 to 8"),
    ({"method": "adalora", "rank": 2, "target_rank": 3}, "peft.target_rank: found 3, expected 1 to 2"),
    ({"method": "layers", "frozen_layers": 3}, "peft.frozen_layers"),
    ({"method": "adalora", "start_share": 0.8, "settle_share": 0.5}, "peft.settle_share"),
    ({"method": "prompt", "prompt_length": 8}, "peft.prompt_length: found 8, expected 0 to 7")])
def test_fields_out_of_bounds(fields, said):
    with pytest.raises(KgrecError, match=said):
        peft.init(peft.PeftConfig(**{**SMALL, **fields}), CONFIG, PARAMS, jax.random.key(0))


def test_words_and_prompt_must_fit_the_positions():
    cfg = of("prompt", prompt_length=3)
    with pytest.raises(KgrecError, match="found 3 beside texts of 6 tokens, expected at most 8"):
        states(cfg, {"prompt": jnp.zeros((3, 8))})
