"""The graph stage on the toy world with a small random BERT: it learns, resumes bit for bit, and never sees who liked what."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest
from flax.serialization import to_bytes

from kgrec_jax import checkpoint
from kgrec_jax.data.dataset import Interactions
from kgrec_jax.data.folder import read_folder
from kgrec_jax.data.link_batches import LinkSource
from kgrec_jax.data.text import train_wordpiece
from kgrec_jax.data.toy import toy_world
from kgrec_jax.errors import KgrecError
from kgrec_jax.evaluation.link_prediction import evaluate_link_prediction
from kgrec_jax.linear.rule_scorer import RuleScorer
from kgrec_jax.linear.rules import RuleConfig, mine_rules
from kgrec_jax.models import bert
from kgrec_jax.models.graph_embedding import load_graph_embedding
from kgrec_jax.optim import OptimConfig
from kgrec_jax.sharding import MeshConfig, make_mesh
from kgrec_jax.stages import graph as stage
from kgrec_jax.stages import graph_bi_encoder, graph_structure, graph_text, pretrain
from kgrec_jax.tracking import Tracker

SMALL = stage.Config(dim=16, steps=60, batch=64, tails=4, test_share=0.1, text_steps=12, text_batch=16, text_length=16,
                     text_eval=20, checkpoint_every=5, log_every=5, lora_rank=4)


@pytest.fixture(scope="module")
def world():
    return toy_world(num_users=30, num_items=60)


@pytest.fixture(scope="module")
def encoder_folder(world, tmp_path_factory):
    """A random BERT with a masked-LM head and a tokenizer that knows the toy world's English."""
    folder = tmp_path_factory.mktemp("encoder") / "bert"
    train_wordpiece([*world.item_texts, *world.graph.entity_names, *world.graph.relation_names], folder, vocab_size=300)
    config = bert.BertConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                             max_position_embeddings=48)
    tree = {"bert": bert.init_encoder(config, jax.random.key(0)), "cls": bert.init_head(config, jax.random.key(1))}
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    (folder / "flax_model.msgpack").write_bytes(to_bytes(tree))
    return folder


@dataclasses.dataclass
class Run:
    """As much of a run as the stage asks for."""

    path: object
    dataset: object

    mesh: object = dataclasses.field(default_factory=lambda: make_mesh(MeshConfig()))

    def __post_init__(self):
        self.tracker, self.lines = Tracker(self.path, quiet=True), []
        self.tracker.say = self.lines.append

    def stage(self, name):
        (self.path / name).mkdir(parents=True, exist_ok=True)
        return self.path / name


def train(path, dataset, encoder, cfg=SMALL, mesh=None):
    run = Run(path, dataset, *([] if mesh is None else [mesh]))
    experiment = types.SimpleNamespace(seed=3, encoder=str(encoder), graph=cfg, pretrain=pretrain.Config())
    return stage.run(experiment, run), run


def left(path):
    """What the stage left, as flat NumPy arrays."""
    trees = [checkpoint.load_tree(path / "graph" / name) for name in ("tables", "encoder") if (path / "graph" / name).is_dir()]
    return [np.asarray(x) for x in jax.tree.leaves(trees)]


def assert_same(a, b):
    assert len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def finished(world, encoder_folder, tmp_path_factory):
    """An uninterrupted run: (folder, results)."""
    path = tmp_path_factory.mktemp("finished")
    return path, train(path, world, encoder_folder)[0]


def test_leaves_tables_bridge_and_merged_encoder(world, encoder_folder, finished):
    path, results = finished
    tables = checkpoint.load_tree(path / "graph" / "tables")
    graph, _ = stage.training_graph(world.graph)
    assert tables["entity"].shape == (graph.num_entities, 16) and tables["relation"].shape == (2 * graph.num_relations, 16)
    assert set(tables["bridge"]) == {"soft", "link"}
    told = json.loads((path / "graph" / "tables.json").read_text())
    assert told["scorer"] == "complex" and told["has_bridge"] and told["relation_ids"] == list(graph.relation_ids)
    released = pretrain.stage_encoder(types.SimpleNamespace(encoder=str(encoder_folder)), Run(path, world)).params
    merged = checkpoint.load_tree(path / "graph" / "encoder")
    same = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), merged, released)  # the same tree, adapters merged
    assert not same["encoder"]["layer"]["0"]["attention"]["self"]["query"]["kernel"]
    assert same["embeddings"]["word_embeddings"]["embedding"] and same["cls"]["predictions"]["bias"]
    assert results["text"]["mlm"] == "yes" and np.isfinite(results["text"]["mlm_loss"])
    assert results["triples"]["test"] > 0 and results["split"] == "held out by pairs"
    assert {"mrr", "hits@10", "queries"} <= results["link_prediction"]["test"].keys()


def test_learns_what_can_be_known(world, tmp_path, encoder_folder):
    cfg = dataclasses.replace(SMALL, steps=150, encoder_mode="off")
    results, _ = train(tmp_path, world, encoder_folder, cfg)
    graph, _ = stage.training_graph(world.graph)
    data = stage.link_data(cfg, graph, 3)
    model = stage.make_model(cfg, graph, 8)
    # The test triples are few: chance is the mean of several fresh tables.
    chance = np.mean([stage.evaluate(model, model.init(jax.random.key(k)), data, 2)["tail/mrr"] for k in range(5)])
    assert results["link_prediction"]["test"]["tail/mrr"] > 3 * chance
    # Genres and directors of the toy world are drawn at random: that an answer is one of its kind is all there is to know.
    assert results["link_prediction"]["test"]["tail/mrr"] > 0.15
    assert results["structure"]["link_loss"] < 0.6 * np.log(graph.num_entities)
    assert "off" in results["text"]["skipped"] and not (tmp_path / "graph" / "encoder").exists()


@pytest.mark.slow
def test_words_alone_find_what_the_texts_say(world, tmp_path, encoder_folder):
    """The texts name genre, director and decade: they tell of a held-out triple what no structure can know."""
    cfg = dataclasses.replace(SMALL, encoder_mode="full", entity_words="name-and-text", text_steps=250, text_length=40, text_batch=32,
                              steps=100, withhold=0.5, text_eval=100, checkpoint_every=1000, mlm_weight=0.0,
                              encoder_optim=OptimConfig(peak_lr=3e-3), bridge_optim=OptimConfig(peak_lr=5e-3))
    results, _ = train(tmp_path, world, encoder_folder, cfg)
    words = results["text"]["link_prediction_words_alone"]["tail/mrr"]
    assert words > 1.3 * results["link_prediction"]["test"]["tail/mrr"]


@pytest.mark.parametrize("broken_at", ["structure", "text"])
def test_goes_on_bit_for_bit_after_a_break(world, tmp_path, encoder_folder, finished, monkeypatch, broken_at):
    read = LinkSource.__getitem__

    def breaking(self, step):
        if step == 8 and self.batch == (64 if broken_at == "structure" else 16):
            raise RuntimeError("the power is gone")
        return read(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(LinkSource, "__getitem__", breaking)
        with pytest.raises(RuntimeError, match="the power is gone"):
            train(tmp_path, world, encoder_folder)
    assert not (tmp_path / "graph" / "tables").exists()
    saved = {int(p.name) for p in (tmp_path / "graph" / broken_at / "checkpoints").iterdir() if p.name.isdigit()}
    assert saved == {5}
    results, _ = train(tmp_path, world, encoder_folder)
    path, expected = finished
    assert_same(left(tmp_path), left(path))
    assert results["link_prediction"] == expected["link_prediction"]
    assert results["text"]["link_prediction"] == expected["text"]["link_prediction"]


def test_a_finished_stage_is_read_and_not_trained_again(world, encoder_folder, finished, monkeypatch):
    path, expected = finished
    monkeypatch.setattr(LinkSource, "__getitem__", lambda self, step: pytest.fail("trained again"))
    before = left(path)
    results, _ = train(path, world, encoder_folder)
    assert results["link_prediction"] == expected["link_prediction"]
    assert_same(left(path), before)


def test_interactions_never_matter(world, tmp_path, encoder_folder, finished):
    """Held-out or not: tables and encoder are the same, bit for bit, whoever liked what."""
    rng = np.random.default_rng(9)
    log = world.interactions
    other = dataclasses.replace(log, item=rng.permutation(log.item), user=rng.permutation(log.user))
    for name, interactions in (("other", other), ("none", Interactions.empty())):
        changed = dataclasses.replace(world, interactions=interactions, part=np.zeros(len(interactions), np.int8))
        results, _ = train(tmp_path / name, changed, encoder_folder)
        assert_same(left(tmp_path / name), left(finished[0]))
        assert results["link_prediction"] == finished[1]["link_prediction"]


@pytest.mark.slow
def test_a_frozen_encoder_is_not_left_again(world, tmp_path, encoder_folder):
    cfg = dataclasses.replace(SMALL, steps=10, text_steps=4, encoder_mode="frozen")
    results, _ = train(tmp_path, world, encoder_folder, cfg)
    assert results["text"]["encoder_mode"] == "frozen" and not (tmp_path / "graph" / "encoder").exists()


def test_a_given_split_is_kept(world, tmp_path, encoder_folder):
    part = np.zeros(len(world.graph.triples), np.int8)
    part[[3, 70, 130]] = 2
    part[5] = 1
    given = dataclasses.replace(world, graph=dataclasses.replace(world.graph, part=part))
    results, _ = train(tmp_path, given, encoder_folder, dataclasses.replace(SMALL, steps=10, encoder_mode="off"))
    assert results["split"] == "given" and results["link_prediction"]["test"]["queries"] == 6
    assert results["triples"] == {"train": len(part) - 4, "valid": 1, "test": 3}


def test_a_language_that_the_tokenizer_does_not_know_leaves_the_structure(tmp_path, encoder_folder):
    results, run = train(tmp_path, toy_world(num_users=30, num_items=60, language="zh"), encoder_folder,
                         dataclasses.replace(SMALL, steps=10))
    assert "[UNK]" in results["text"]["skipped"] and any("structure alone" in line for line in run.lines)
    assert results["link_prediction"]["test"]["queries"] > 0 and not json.loads((tmp_path / "graph" / "tables.json").read_text())["has_bridge"]


def test_no_graph_and_a_bad_width(world, tmp_path, encoder_folder):
    empty = dataclasses.replace(world.graph, triples=np.zeros((0, 3), np.int32), part=np.zeros(0, np.int8))
    results, _ = train(tmp_path, dataclasses.replace(world, graph=empty), encoder_folder)
    assert results == {"skipped": "the data set has no triples"}
    with pytest.raises(KgrecError, match="graph.dim: found 15"):
        train(tmp_path, world, encoder_folder, dataclasses.replace(SMALL, dim=15))


def test_steps_follow_from_the_size_of_the_data():
    small = stage.make_plan(stage.Config(), num_rows=500, num_entities=200)
    assert small.steps == graph_structure.MIN_STEPS and small.candidates == 0
    large = stage.make_plan(stage.Config(), num_rows=2_000_000, num_entities=500_000)
    assert large.candidates == 2048 and large.steps < 30 * 2_000_000 // 512 and large.seconds < 60
    assert stage.make_plan(stage.Config(steps=7), 500, 200).steps == 7


@pytest.mark.parametrize("changes", [
    {"scorer": "distmult", "dura": 0.01}, {"scorer": "simple", "relation_weight": 0.5}, {"scorer": "transe"},
    {"scorer": "rotate"}, {"scorer": "tucker", "n3": 0.0}, {"scorer": "conve", "dim": 32, "n3": 0.0},
    {"scorer": "rotate-l1", "loss": "margin", "rivals": "per-query", "candidates": 4, "n3": 0.0},
    {"scorer": "complex", "loss": "margin", "rivals": "sampled", "candidates": 32},
], ids=lambda changes: "-".join(str(value) for value in changes.values()))
def test_every_scorer_lowers_its_loss_and_is_read_again(world, tmp_path, encoder_folder, changes):
    cfg = dataclasses.replace(SMALL, **{"steps": 60, "encoder_mode": "off", "checkpoint_every": 0} | changes)
    results, _ = train(tmp_path, world, encoder_folder, cfg)
    rows = [json.loads(line) for line in (tmp_path / "graph" / "structure" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["link_loss"] for row in rows if "link_loss" in row]
    assert losses[-1] < 0.9 * losses[0]
    told = json.loads((tmp_path / "graph" / "tables.json").read_text())
    model, tables = load_graph_embedding(told, checkpoint.load_tree(tmp_path / "graph" / "tables"))
    data = stage.link_data(cfg, stage.training_graph(world.graph)[0], 3)
    test = stage.evaluate(model, tables, data, 2)
    assert test["mrr"] == pytest.approx(results["link_prediction"]["test"]["mrr"], abs=1e-6)


@pytest.mark.slow
def test_one_device_gives_what_eight_give(world, tmp_path, encoder_folder):
    """Both trainings on the meshes (1, 1) and (4, 2): all entities as rivals, and sampled ones."""
    for rivals, mode in (("all", "lora"), ("sampled", "off")):
        cfg = dataclasses.replace(SMALL, steps=5, text_steps=2, rivals=rivals, encoder_mode=mode, text_eval=4,
                                  candidates=16, checkpoint_every=0)
        both = []
        for name, shape in (("one", (1, 1)), ("eight", (4, 2))):
            devices = jax.devices()[:shape[0] * shape[1]]
            path = tmp_path / rivals / name
            train(path, world, encoder_folder, cfg, make_mesh(MeshConfig(*shape), devices))
            both.append(left(path))
        for a, b in zip(*both, strict=True):
            np.testing.assert_allclose(a, b, atol=5e-5)


def test_sampled_rivals_learn_too(world, tmp_path, encoder_folder):
    cfg = dataclasses.replace(SMALL, steps=150, encoder_mode="off", rivals="sampled", candidates=16, checkpoint_every=0)
    results, _ = train(tmp_path, world, encoder_folder, cfg)
    assert results["structure"]["rivals"] == 16
    full, _ = train(tmp_path / "full", world, encoder_folder, dataclasses.replace(cfg, rivals="all"))
    assert results["link_prediction"]["test"]["mrr"] > 0.7 * full["link_prediction"]["test"]["mrr"]


def test_a_held_out_pair_is_in_no_query(world):
    data = stage.link_data(SMALL, stage.training_graph(world.graph)[0], 3)
    rows = zip(data.rows.head.tolist(), data.rows.tails.tolist(), data.rows.weight.tolist(), strict=True)
    seen = {frozenset((head, tail)) for head, tails, weights in rows for tail, w in zip(tails, weights, strict=True) if w}
    held_out = np.concatenate([data.triples(1), data.triples(2)]).tolist()
    assert held_out and not any(frozenset((head, tail)) in seen for head, _, tail in held_out)


def test_a_graph_too_small_to_hold_out_is_trained_whole(world, tmp_path, encoder_folder):
    few = dataclasses.replace(world.graph, triples=world.graph.triples[:1], part=np.zeros(1, np.int8))
    cfg = dataclasses.replace(SMALL, steps=3, encoder_mode="off")
    results, _ = train(tmp_path, dataclasses.replace(world, graph=few), encoder_folder, cfg)
    assert results["triples"] == {"train": 1, "valid": 0, "test": 0} and "no pair" in results["link_prediction"]["skipped"]


def test_an_entity_without_a_name_is_never_text(world):
    names = ("", *world.graph.entity_names[1:])
    graph = dataclasses.replace(world.graph, entity_names=names)
    assert graph_text.entity_words(graph, False)[0] == "" and graph_text.entity_words(graph, True)[0] == ""
    assert graph_text.entity_words(graph, True)[1].startswith(f"{names[1]}: ")


@pytest.mark.parametrize("field, value", [("batch", 0), ("test_share", 0.9), ("text_length", 4), ("n3", -1.0)])
def test_a_field_out_of_range_is_named(world, tmp_path, encoder_folder, field, value):
    with pytest.raises(KgrecError, match=f"graph.{field}: found {value}"):
        train(tmp_path, world, encoder_folder, dataclasses.replace(SMALL, **{field: value}))


def test_complex_reaches_the_measured_level_on_umls(shared, tmp_path):
    cfg = stage.Config(dim=256, batch=256, encoder_mode="off", checkpoint_every=0)
    one = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    results, _ = train(tmp_path, read_folder(shared / "data" / "umls"), "none", cfg, one)
    assert results["split"] == "given" and results["link_prediction"]["test"]["mrr"] > 0.93


def test_an_inductive_split_hides_entities_whatever_the_folder_says(world, tmp_path, encoder_folder):
    part = np.zeros(len(world.graph.triples), np.int8)
    part[::7] = 2
    given = dataclasses.replace(world, graph=dataclasses.replace(world.graph, part=part))
    cfg = dataclasses.replace(SMALL, steps=5, encoder_mode="off", unseen_share=0.2)
    results, _ = train(tmp_path, given, encoder_folder, cfg)
    assert results["split"] == "unseen entities" and results["link_prediction"]["test"]["queries"] > 0
    data = stage.link_data(cfg, stage.training_graph(given.graph)[0], 3)
    assert not (data.seen[data.triples(2)[:, 0]] & data.seen[data.triples(2)[:, 2]]).any()
    assert data.seen.sum() <= data.graph.num_entities - round(0.2 * data.graph.num_entities)  # and those whose only neighbours are hidden
    with pytest.raises(KgrecError, match="graph: found no triple to train on among 1 "):
        few = dataclasses.replace(world.graph, triples=world.graph.triples[:1], part=np.zeros(1, np.int8))
        stage.link_data(dataclasses.replace(cfg, unseen_share=0.9), few, 3)


@pytest.mark.parametrize(("found", "message"), [
    ({"loss": "margin"}, "graph.rivals: found 'auto' with graph.loss=margin"),
    ({"rivals": "per-query"}, "graph.rivals: found 'per-query' with graph.loss=softmax"),
    ({"scorer": "rotate-l1"}, "graph.loss: found 'softmax' with graph.scorer=rotate-l1"),
    ({"scorer": "conve", "dim": 32, "dura": 0.1}, "graph.dura: found 0.1 with graph.scorer=conve"),
    ({"scorer": "rotate", "relation_weight": 1.0}, "graph.relation_weight: found 1.0 with graph.scorer=rotate"),
])
def test_what_cannot_go_together_is_named(found, message):
    with pytest.raises(KgrecError, match=message):
        stage.check(dataclasses.replace(SMALL, **found))


def test_rules_of_the_training_triples_join_the_mixture(world, tmp_path, encoder_folder):
    cfg = dataclasses.replace(SMALL, steps=5, encoder_mode="off", rules="on")
    results, run = train(tmp_path, world, encoder_folder, cfg)
    links = results["link_prediction"]
    assert set(results["mixture"]) == {"structure", "rules"} and results["rules"]["rules"] > 0
    assert links["valid"]["mrr"] >= max(links[name]["valid"]["mrr"] for name in ("structure", "rules")) - 1e-6
    assert any("rules of the training triples" in line for line in run.lines)
    data = stage.link_data(cfg, stage.training_graph(world.graph)[0], 3)
    training = dataclasses.replace(data.graph, part=data.part)
    alone = evaluate_link_prediction(RuleScorer(mine_rules(training), training).scores, data.triples(2),
                                     known=data.known, num_entities=data.graph.num_entities)
    assert links["rules"]["test"]["mrr"] == pytest.approx(alone["mrr"], abs=1e-6)
    bad = dataclasses.replace(cfg, rule_mining=RuleConfig(min_confidence=2.0))
    with pytest.raises(KgrecError, match="min_confidence: found 2.0"):
        stage.check(bad)


@pytest.mark.slow
def test_the_bi_encoder_joins_the_mixture_and_reads_unseen_entities(world, tmp_path, encoder_folder):
    pair = graph_bi_encoder.Config(mode="full", batch=16, steps=30, length=16, refresh=16, checkpoint_every=0,
                                   optim=OptimConfig(peak_lr=3e-3))
    cfg = dataclasses.replace(SMALL, steps=5, encoder_mode="off", unseen_share=0.2, bi_encoder=pair)
    results, _ = train(tmp_path, world, encoder_folder, cfg)
    links = results["link_prediction"]
    assert set(results["mixture"]) == {"structure", "text"} and results["split"] == "unseen entities"
    assert links["text"]["test"]["mrr"] > 1.5 * links["structure"]["test"]["mrr"]  # whose rows were never trained
    assert results["mixture"]["text"] > 0.5 and links["valid"]["mrr"] >= links["structure"]["valid"]["mrr"]
    weights, entities, scale = graph_bi_encoder.load_bi_encoder(tmp_path / "graph")
    assert len(entities) == results["entities"] and scale > 0 and weights
    again, _ = train(tmp_path, world, encoder_folder, cfg)
    assert again["link_prediction"] == links  # what is finished is read
    with pytest.raises(KgrecError, match="graph.bi_encoder.batch: found 1"):
        stage.check(dataclasses.replace(cfg, bi_encoder=dataclasses.replace(pair, batch=1)))
