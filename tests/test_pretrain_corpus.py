"""Pretraining on a corpus of files: from scratch, whole, causal; rounding and memory."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_pretrain import Experiment, Run
from tiny_encoder import make_tiny_encoder

from kgrec_jax import KgrecError, train
from kgrec_jax.data.mlm_batches import PackedTexts
from kgrec_jax.data.text import load_tokenizer
from kgrec_jax.data.toy import toy_world
from kgrec_jax.errors import Interrupted
from kgrec_jax.models import encoders
from kgrec_jax.models.text_encoder import encode_texts
from kgrec_jax.optim import OptimConfig, make_optimizer
from kgrec_jax.stages import pretrain

SHAPE = pretrain.Shape(vocab_size=150, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                       intermediate_size=32, max_position_embeddings=24)
SCRATCH = pretrain.Config(mode="scratch", rows="packed", masking="word", shape=SHAPE, steps=40, batch=8, length=16,
                          accumulate=2, ema=0.9, valid_limit=20, eval_every=20, checkpoint_every=10, log_every=10,
                          optim=OptimConfig(peak_lr=1e-2, layer_decay=0.9, weight_decay=0.01))


class NoData(Run):
    """A run without a data set."""

    def __init__(self, path):
        super().__init__(path, None)
        del self.dataset


@pytest.fixture(scope="module")
def texts():
    return pretrain.texts_of(toy_world(num_users=20, num_items=150))


@pytest.fixture(scope="module")
def folder(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(json.dumps({"text": t}) for t in texts[:70]).encode()))
    (folder / "b.txt").write_text("\n".join(texts[60:]), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def scratch(folder, tmp_path_factory):
    run = NoData(tmp_path_factory.mktemp("run"))
    experiment = Experiment("none", dataclasses.replace(SCRATCH, corpus=(str(folder),)))
    return experiment, run, pretrain.run(experiment, run)


def test_from_scratch(scratch, texts):
    experiment, run, results = scratch
    assert results["texts"] == len(texts) + 10 and (results["head_steps"], results["steps"]) == (0, 40)
    assert [row["step"] for row in results["way"]] == [0, 20, 40]
    figures = [row["perplexity"] for row in results["way"]]
    assert figures[-1] < 0.9 * figures[0] and figures[0] < 150, "the words' frequencies are known from the beginning"
    assert results["heldout"]["perplexity"] == figures[-1] and "cosine_before" not in results
    encoder = pretrain.stage_encoder(experiment, run)
    tokenizer = load_tokenizer(encoder.tokenizer_folder, encoder.config.vocab_size)
    assert encoder.config == SHAPE.encoder(tokenizer.vocab_size) and encoder.has_mlm_head
    vectors = encode_texts(encoder, encoder.params, tokenizer, texts[:5])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    released = pretrain.released_encoder(experiment, run)
    jax.tree.map(np.testing.assert_array_equal, released.params, encoder.params)


@pytest.mark.slow
def test_a_stopped_run_ends_the_same(scratch, tmp_path, monkeypatch):
    """Stopped between two checkpoints and two evaluations: the batches, the average and the figures go on."""
    experiment, run, results = scratch
    for made in ("tokenizer", "tokens"):
        shutil.copytree(run.path / "pretrain" / made, tmp_path / "pretrain" / made)
    read = PackedTexts.__getitem__

    def stopping(source, step):
        if step == 15 and not source.cover:
            os.kill(os.getpid(), signal.SIGINT)
        return read(source, step)

    monkeypatch.setattr(PackedTexts, "__getitem__", stopping)
    with pytest.raises(Interrupted, match="stopped at step 1[0-9] of 40"):
        pretrain.run(experiment, NoData(tmp_path))
    monkeypatch.undo()
    again = NoData(tmp_path)
    second = pretrain.run(experiment, again)
    assert {n: v for n, v in second.items() if n != "seconds"} == {n: v for n, v in results.items() if n != "seconds"}
    jax.tree.map(np.testing.assert_array_equal, *(pretrain.stage_encoder(experiment, r).params for r in (run, again)))


def test_another_corpus_is_refused(scratch, folder, tmp_path):
    experiment, run, _ = scratch
    shutil.copytree(run.path / "pretrain", tmp_path / "pretrain")
    other = dataclasses.replace(experiment.pretrain, corpus=(str(folder / "b.txt"),))
    with pytest.raises(KgrecError, match="found the tokens of another corpus .files differ"):
        pretrain.run(dataclasses.replace(experiment, pretrain=other), NoData(tmp_path))


def test_causal_from_scratch(folder, tmp_path):
    cfg = dataclasses.replace(SCRATCH, objective="causal", corpus=(str(folder),), rows="buckets", steps=20,
                              eval_every=10)
    experiment, run = Experiment("none", cfg), NoData(tmp_path)
    results = pretrain.run(experiment, run)
    assert set(results["heldout"]) == {"next_token_accuracy", "perplexity"}
    assert results["way"][-1]["perplexity"] < 0.9 * results["way"][0]["perplexity"]
    encoder = pretrain.stage_encoder(experiment, run)
    assert encoder.is_causal and not encoder.has_mlm_head and "wte" in encoder.params


@pytest.mark.slow
def test_the_whole_encoder_learns(folder, texts, tmp_path):
    source = str(make_tiny_encoder(tmp_path / "tiny", texts, kind="torch-mlm"))
    cfg = pretrain.Config(mode="full", corpus=(str(folder),), steps=10, head_steps=4, batch=8, length=16,
                          eval_every=5, optim=OptimConfig(peak_lr=3e-3))
    experiment, run = Experiment(source, cfg), NoData(tmp_path)
    results = pretrain.run(experiment, run)
    assert len(results["way"]) == 3 and results["way"][-1]["perplexity"] < results["way"][0]["perplexity"]
    before, after = pretrain.load_encoder(source).params, pretrain.stage_encoder(experiment, run).params
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), before, after)
    assert moved["embeddings"]["word_embeddings"]["embedding"] and moved["encoder"]["layer"]["0"]["output"]


@pytest.mark.parametrize("change,words", [
    ({"corpus": ("/no/such",)}, "pretrain.corpus: found no file or folder /no/such"),
    ({"accumulate": 0}, "pretrain.accumulate: found 0"), ({"ema": 1.0}, "pretrain.ema: found 1.0"),
    ({"length": 25}, "pretrain.length: found 25, expected 3 to 24"),
    ({"shape": dataclasses.replace(SHAPE, num_attention_heads=3)}, "pretrain.shape.num_attention_heads: found 3"),
    ({"shape": dataclasses.replace(SHAPE, num_attention_heads=3), "objective": "causal"},
     "pretrain.shape.num_attention_heads: found 3"),
    ({"shape": dataclasses.replace(SHAPE, vocab_size=5)}, "pretrain.shape: found vocab_size 5")])
def test_bad_fields(folder, tmp_path, change, words):
    cfg = dataclasses.replace(SCRATCH, **{"corpus": (str(folder),), **change})
    with pytest.raises(KgrecError, match=words):
        pretrain.run(Experiment("none", cfg), NoData(tmp_path))


def test_bad_corpora(texts, tmp_path):
    source = str(make_tiny_encoder(tmp_path / "tiny", texts))
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "zh.txt").write_text("这是一本关于爱情的小说\n" * 9, encoding="utf-8")
    for name, words in (("empty.txt", "found no text in .*empty.txt"), ("zh.txt", "pretrain.mode scratch")):
        cfg = pretrain.Config(corpus=(str(tmp_path / name),), length=16)
        with pytest.raises(KgrecError, match=words):
            pretrain.run(Experiment(source, cfg), NoData(tmp_path / name.partition(".")[0]))
    cfg = pretrain.Config(corpus=(str(tmp_path / "zh.txt"),), length=16, objective="causal")
    with pytest.raises(KgrecError, match="pretrain.objective: found causal with an encoder of type bert"):
        pretrain.run(Experiment(source, cfg), NoData(tmp_path / "c"))


class Loss:
    """The loss of a tiny encoder on packed rows of some texts."""

    def __init__(self, texts, folder, causal=False, **shape):
        self.tokenizer = load_tokenizer(make_tiny_encoder(folder / "t", texts))
        self.masking = "next" if causal else "token"
        self.config = dataclasses.replace(SHAPE, **shape).encoder(self.tokenizer.vocab_size, causal)
        self.ids = tuple(map(tuple, self.tokenizer.encode(texts, 99, special=False)))

    def source(self, steps, batch=8):
        return PackedTexts(self.ids, self.tokenizer, steps, batch, 16, 0.15, (0, 1), masking=self.masking)

    def __call__(self, params, constants, batch, key, **options):
        return pretrain.loss(self.config, params, batch, key, **options)


@pytest.mark.parametrize("causal", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_remat_keeps_less_and_changes_nothing_else(texts, tmp_path, causal):
    loss = Loss(texts, tmp_path, causal=causal)
    params, key = encoders.init(loss.config, jax.random.key(0), head=True), jax.random.key(1)
    batch, sizes, grads = jax.tree.map(jnp.asarray, loss.source(1, 64)[0]), [], []
    for remat in (False, True):
        def of(p, remat=remat):
            return loss(p, {}, batch, key, remat=remat)[0]

        kept = jax.tree.leaves(jax.eval_shape(lambda p, of=of: jax.vjp(of, p)[1], params))
        sizes.append(sum(x.size for x in kept))
        grads.append(jax.jit(jax.grad(of))(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *grads)
    assert sizes[1] < 0.6 * sizes[0], "numbers that the backward pass needs of the forward pass"


@pytest.mark.slow
def test_bfloat16_loses_less_than_a_hundredth(texts, tmp_path):
    """The loss over the last of 200 steps, on the same batches."""
    loss = Loss(texts, tmp_path, hidden_size=32, intermediate_size=64)
    last = {}
    for dtype in ("float32", "bfloat16"):
        run = NoData(tmp_path / dtype)
        fitted = train.fit(
            workdir=run.path, init_fn=lambda key: encoders.init(loss.config, key, head=True),
            loss_fn=lambda p, c, b, k, d=dtype: loss(p, c, b, k, dtype=d), constants={}, source=loss.source(200),
            tx=make_optimizer(OptimConfig(peak_lr=3e-3), 200), seed=0, mesh=run.mesh, rules=encoders.rules(loss.config),
            log_every=40, checkpoint_every=0, label=dtype, tracker=run.tracker)
        last[dtype] = fitted.metrics["loss"]
    assert last["float32"] < 4.5 and last["bfloat16"] == pytest.approx(last["float32"], rel=0.01), last
