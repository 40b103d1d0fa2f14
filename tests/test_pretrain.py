"""The pretraining stage on the toy world and a tiny encoder."""

from __future__ import annotations

import dataclasses
import pathlib
import shutil

import jax
import numpy as np
import pytest
from tiny_encoder import make_tiny_encoder

from kgrec_jax import KgrecError
from kgrec_jax.data.text import load_tokenizer
from kgrec_jax.data.toy import toy_world
from kgrec_jax.models import bert
from kgrec_jax.optim import OptimConfig
from kgrec_jax.pretrained import load_encoder
from kgrec_jax.sharding import MeshConfig, make_mesh
from kgrec_jax.stages import pretrain
from kgrec_jax.tracking import Tracker

CONFIG = pretrain.Config(head_steps=12, steps=30, batch=8, length=16, lora_rank=2, log_every=4, checkpoint_every=4,
                         optim=OptimConfig(peak_lr=3e-3))


@dataclasses.dataclass(frozen=True)
class Experiment:
    encoder: str
    pretrain: pretrain.Config = CONFIG
    seed: int = 0


class Run:
    def __init__(self, path: pathlib.Path, dataset, data=1):
        self.path, self.dataset, self.tracker = path, dataset, Tracker(path, quiet=True)
        self.mesh = make_mesh(MeshConfig(data=data), jax.devices()[:data])

    def stage(self, name):
        (self.path / name).mkdir(parents=True, exist_ok=True)
        return self.path / name


@pytest.fixture(scope="module")
def world():
    return toy_world(num_users=20, num_items=150)


@pytest.fixture(scope="module")
def experiment(world, tmp_path_factory):
    return Experiment(str(make_tiny_encoder(tmp_path_factory.mktemp("e") / "tiny", pretrain.texts_of(world))))


@pytest.fixture(scope="module")
def finished(experiment, world, tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("run"), world)
    return run, pretrain.run(experiment, run)


def test_what_the_stage_leaves(experiment, finished):
    run, results = finished
    assert (results["head_steps"], results["steps"]) == (12, 30)
    assert results["texts"] == len(pretrain.texts_of(run.dataset))
    assert 1 < results["heldout"]["perplexity"] < results["head_only"]["perplexity"] < 211
    encoder = pretrain.stage_encoder(experiment, run)
    released = load_encoder(experiment.encoder)
    assert encoder.has_mlm_head and not released.has_mlm_head
    layer, before = (e.params["encoder"]["layer"]["0"] for e in (encoder, released))
    query, query_before = (tree["attention"]["self"]["query"]["kernel"] for tree in (layer, before))
    assert np.abs(query - query_before).max() > 1e-4
    np.testing.assert_array_equal(layer["intermediate"]["dense"]["kernel"], before["intermediate"]["dense"]["kernel"])
    np.testing.assert_array_equal(bert.word_table(encoder.params), bert.word_table(released.params))


def test_a_run_cut_between_the_trainings_ends_the_same(experiment, finished, tmp_path):
    run, results = finished
    shutil.copytree(run.path / "pretrain" / "head", tmp_path / "pretrain" / "head")
    again = Run(tmp_path, run.dataset)
    assert pretrain.run(experiment, again)["heldout"] == results["heldout"]
    jax.tree.map(np.testing.assert_array_equal, *(pretrain.stage_encoder(experiment, r).params for r in (run, again)))


@pytest.mark.slow
def test_two_devices_agree_with_one(experiment, finished, tmp_path):
    run, results = finished
    shutil.copytree(run.path / "pretrain" / "head", tmp_path / "pretrain" / "head")
    figures = pretrain.run(experiment, Run(tmp_path, run.dataset, data=2))["heldout"]
    # Dropout draws the same bits on every mesh; what differs is the order of sums.
    assert figures["perplexity"] == pytest.approx(results["heldout"]["perplexity"], rel=1e-4)


def test_a_checkpoint_with_a_head_keeps_it(world, tmp_path):
    folder = make_tiny_encoder(tmp_path / "mlm", pretrain.texts_of(world), kind="torch-mlm")
    run = Run(tmp_path / "run", world)
    results = pretrain.run(Experiment(str(folder), dataclasses.replace(CONFIG, steps=1)), run)
    assert results["head_steps"] == 0 and "head_only" not in results and not (run.path / "pretrain" / "head").exists()


def test_reasons_to_skip(experiment, world, tmp_path):
    off = dataclasses.replace(experiment, pretrain=dataclasses.replace(CONFIG, mode="off"))
    run = Run(tmp_path, world)
    assert pretrain.run(off, run) == {"skipped": "pretrain.mode is off"}
    graph = dataclasses.replace(world.graph, entity_texts=("",) * world.graph.num_entities)
    silent = dataclasses.replace(world, item_texts=("",) * world.num_items, graph=graph)
    assert "texts" in pretrain.run(experiment, Run(tmp_path, silent))["skipped"]
    chinese = pretrain.run(experiment, Run(tmp_path, toy_world(num_users=20, num_items=60, language="zh")))
    assert "[UNK]" in chinese["skipped"] and chinese["text_fallback"] and chinese["coverage"]["unk_share"] > 0.2
    assert not pretrain.stage_encoder(experiment, run).has_mlm_head


def test_steps_follow_from_the_number_of_texts():
    cfg = pretrain.Config()
    plans = [pretrain.make_plan(cfg, n, has_head=False) for n in (10, 100, 100_000)]
    assert [p.head_steps for p in plans] == [4, 13, 24] and [p.steps for p in plans] == [4, 13, 36]
    assert plans[2].head_steps + plans[2].steps <= 60 and plans[0].seconds < plans[1].seconds < plans[2].seconds < 90
    assert pretrain.make_plan(cfg, 100_000, has_head=True).head_steps == 0


def test_a_fresh_head_begins_with_the_frequencies_of_the_words(experiment):
    encoder = load_encoder(experiment.encoder)
    head = pretrain.fresh_head(encoder.config, ((5, 5, 5, 6), (6,)), jax.random.key(0))
    assert jax.tree.structure(head) == jax.tree.structure(bert.init_head(encoder.config, jax.random.key(0)))
    shares = np.exp(np.asarray(head["predictions"]["bias"], np.float64))
    assert shares.sum() == pytest.approx(1, abs=1e-5) and shares[5] / shares[6] == pytest.approx(3.05 / 2.05, rel=1e-4)


def test_bad_fields(experiment, world, tmp_path):
    for field, value in (("length", 41), ("mask_share", 1.0), ("lora_rank", 0), ("batch", 0), ("valid_share", 1.0)):
        bad = dataclasses.replace(experiment, pretrain=dataclasses.replace(CONFIG, **{field: value}))
        with pytest.raises(KgrecError, match=f"{field}: found {value}"):
            pretrain.run(bad, Run(tmp_path / field, world))


def test_held_out_texts_are_not_trained_on(experiment, world):
    encoder = load_encoder(experiment.encoder)
    texts = pretrain.texts_of(world)
    corpus = pretrain.make_corpus(CONFIG, texts, load_tokenizer(encoder.tokenizer_folder), seed=0)
    assert len(corpus.valid) == len(texts) // 10 and len(corpus.train) + len(corpus.valid) == len(texts)
    assert not set(corpus.train) & set(corpus.valid)


def test_words_of_the_data_set_can_be_hidden_whole(experiment, world):
    """A token that goes on with a word is marked; otherwise the texts are the same."""
    tokenizer = load_tokenizer(load_encoder(experiment.encoder).tokenizer_folder)
    plain, marked = (pretrain.make_corpus(dataclasses.replace(CONFIG, masking=masking), pretrain.texts_of(world),
                                          tokenizer, seed=0).train for masking in ("token", "word"))
    names = tokenizer.backend.convert_ids_to_tokens
    for row, other in zip(plain, marked, strict=True):
        assert row == tuple(~t if t < 0 else t for t in other)
        assert [t < 0 for t in other] == [name.startswith("##") for name in names(list(row))]
