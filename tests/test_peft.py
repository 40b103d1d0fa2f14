"""Adapters: nothing at first, a low-rank sum later, plain weights after merging."""

import jax
import jax.numpy as jnp
import numpy as np
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
