"""The bench of link prediction: its rounds and words, its peer's protocol, and the step on rows in use."""

import dataclasses
import json
import stat
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kgrec_jax.bench import graph as bench
from kgrec_jax.cli import main
from kgrec_jax.data.link_batches import LinkBatch
from kgrec_jax.errors import KgrecError
from kgrec_jax.evaluation.link_prediction import KnownTails, add_inverses, evaluate_link_prediction, rank_tails
from kgrec_jax.models.graph_embedding import GraphEmbedding
from kgrec_jax.optim import OptimConfig, make_optimizer
from kgrec_jax.stages.graph_config import Config
from kgrec_jax.stages.graph_sparse import init_sparse, make_sparse_step, sparse_batch
from kgrec_jax.stages.graph_structure import structure_loss
from kgrec_jax.train import TrainState, make_step

N, R, D = 40, 3, 8

FAKE = """#!{python}
import json, sys
print("a library that prints")
print(json.dumps({{"program": "fake " + sys.argv[1].rpartition("/")[2]}}), flush=True)
for line in sys.stdin:
    order = json.loads(line)
    if order["measure"] == {dies!r}:
        sys.exit("it broke here")
    told = {{"seconds": 2.0, "cpu_s": 4.0, "count": order["count"], "mrr": 0.1, "peak_mb": 2000.0}}
    print(json.dumps(told), flush=True)
"""


def _fake_peer(tmp_path, dies=""):
    path = tmp_path / "python"
    path.write_text(FAKE.format(python=sys.executable, dies=dies))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.fixture
def folder(tmp_path):
    """A dataset folder with a small generated graph and its split."""
    triples, part = bench.generated_graph(120, 4, (600, 50, 60), seed=1)
    out = tmp_path / "data"
    out.mkdir()
    for number, name in enumerate(("train", "valid", "test")):
        rows = "".join(f"e{h}\tr{r}\te{t}\n" for h, r, t in triples[part == number])
        (out / f"triples.{name}.tsv").write_text("head_id\trelation\ttail_id\n" + rows)
    return out


def test_a_run_beside_a_peer(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")  # one device, as on the command line
    words = ["--data", str(folder), "--dim", "4", "--batch", "64", "--steps", "2", "--rounds", "2", "--triples", "20",
             "--peer-python", _fake_peer(tmp_path), "--json"]
    assert main(["bench", "graph", *words]) == 0
    result = json.loads(capsys.readouterr().out)
    triples = result["triples"]
    assert triples == 600 and result["steps"] == {"link": 2, "sampled": 600 // 64 - 2, "evaluation": 20}
    assert result["peer_program"] == "fake graph_peer.py" and len(result["rounds"]) == 2
    assert result["peer"]["link_per_s"] == 1.0 and result["peer"]["evaluation_per_s"] == 10.0
    for name, found in result["ratios"].items():
        rates = [one["ours"][name]["count"] / one["ours"][name]["seconds"] for one in result["rounds"]]
        theirs = [one["peer"][name]["count"] / 2.0 for one in result["rounds"]]
        np.testing.assert_allclose(found, np.divide(rates, theirs))
        by_cpu = [one["ours"][name]["count"] / one["ours"][name]["cpu_s"] for one in result["rounds"]]
        np.testing.assert_allclose(result["cpu_ratios"][name], 2 * np.divide(by_cpu, theirs))
        assert result["ratio"][name] == pytest.approx(np.median(found))
    assert result["ratio"]["peak_mb"] == pytest.approx(result["ours"]["peak_mb"] / 2000)
    assert result["ours"]["epoch_s"] == pytest.approx(result["queries"] / result["ours"]["link_per_s"])
    assert 0 < result["ours"]["mrr"] < 1 and result["ours"]["compile_s"] > 0
    shown = "\n".join(bench.lines(result))
    assert "fake graph_peer.py" in shown and f"{result['ratio']['evaluation']:.2f}" in shown
    of_peer = ("peer", "ratio", "ratios", "cpu_ratios", "peer_program")
    alone = {key: value for key, value in result.items() if key not in of_peer}
    assert "ratio" not in "\n".join(bench.lines(alone))


def test_a_peer_that_cannot_run(folder, tmp_path):
    def run(peer):
        return bench.run(["--data", str(folder), "--dim", "4", "--batch", "64", "--steps", "1", "--rounds", "1",
                          "--peer-python", peer])

    with pytest.raises(KgrecError, match="--peer-python: found .*absent, which cannot be run"):
        run(str(tmp_path / "absent"))
    with pytest.raises(KgrecError, match="--peer-python: found an interpreter that cannot import PyKEEN .*, expected"):
        run(sys.executable)  # the one that runs the tests has no PyKEEN
    with pytest.raises(KgrecError, match="--peer-python: found a program that ended with exit code 1.*it broke here"):
        run(_fake_peer(tmp_path, dies="link"))


def test_bad_arguments(folder, tmp_path, capsys):
    for words, said in ((["--rounds", "0"], "--rounds: found '0'"), (["--optimizer", "x"], "--optimizer: found 'x'"),
                        (["--data", str(tmp_path / "no")], "data.path: found no such folder"),
                        (["--data", str(folder), "--batch", "400"], "--batch: found 400, expected at most a third")):
        assert main(["bench", "graph", *words]) == 2
        assert f"kgrec: {said}" in capsys.readouterr().err
    (folder / "triples.test.tsv").unlink()
    assert main(["bench", "graph", "--data", str(folder)]) == 2
    assert "--data: found 600 training and 0 test triples" in capsys.readouterr().err


def test_the_generated_graph():
    triples, part = bench.generated_graph(200, 5, (1000, 30, 40), seed=3)
    assert triples.shape == (1070, 3) and len(np.unique(triples, axis=0)) == 1070
    assert np.bincount(part).tolist() == [1000, 30, 40]
    assert triples.min() == 0 and triples[:, [0, 2]].max() < 200 and triples[:, 1].max() < 5
    degree = np.sort(np.bincount(triples[:, [0, 2]].ravel(), minlength=200))
    assert degree[-20:].sum() > 2 * degree.sum() / 10  # skewed
    np.testing.assert_array_equal(triples, bench.generated_graph(200, 5, (1000, 30, 40), seed=3)[0])
    with pytest.raises(KgrecError, match="expected at most a quarter"):
        bench.generated_graph(4, 1, (10,))


def test_each_distinct_query_is_scored_once_with_the_same_ranks():
    rng = np.random.default_rng(0)
    triples = np.stack([rng.integers(0, 6, 120), rng.integers(0, R, 120), rng.integers(0, N, 120)], 1).astype(np.int32)
    cube = rng.integers(0, 5, (N, 2 * R, N + 3)).astype(np.float32)
    cube[2, 1, ::3] = np.nan
    asked = []

    def score(heads, relations):
        asked.append(list(zip(heads.tolist(), relations.tolist(), strict=True)))
        return jnp.asarray(cube[heads, relations])

    known = KnownTails.of(triples, R)
    both = add_inverses(triples, R)
    expected = rank_tails(lambda h, r: jnp.asarray(cube[h, r]), *both.T, known=known, num_entities=N)
    for block in (1, 7, 64, 1000):
        asked.clear()
        found = evaluate_link_prediction(score, triples, known=known, num_entities=N, block=block)
        assert found["mrr"] == np.mean(1 / expected) and found["mr"] == np.mean(expected)
        assert found["tail/mr"] == np.mean(expected[:120]) and found["head/mr"] == np.mean(expected[120:])
        assert {len(one) for one in asked} == {block}  # one shape
        distinct = np.unique(both[:, :2], axis=0)
        assert len(asked) == -(-len(distinct) // block) and len(distinct) < len(both)


def test_the_lists_are_the_same_where_a_triple_is_no_single_number(monkeypatch):
    triples = np.random.default_rng(2).integers(0, 3, (50, 3)).astype(np.int32)
    plain = KnownTails.of(triples, 3)

    class Narrow:
        max = 4  # as if ids were too large for one number

    monkeypatch.setattr("kgrec_jax.evaluation.link_prediction.np.iinfo", lambda dtype: Narrow)
    paired = KnownTails.of(triples, 3)
    for field in ("keys", "starts", "tails"):
        np.testing.assert_array_equal(getattr(plain, field), getattr(paired, field))
        assert getattr(plain, field).dtype == getattr(paired, field).dtype


@pytest.mark.parametrize("scorer", ["rotate", "rotate-l1"])
def test_a_step_on_the_rows_in_use_is_the_dense_step(scorer):
    """Rows that occur several times in a batch, padding with weight 0, regulariser and schedule included."""
    optim = OptimConfig(table_name="rowwise-adagrad", table_patterns=("embedding$",), table_peak_lr=0.1,
                        schedule="linear", warmup_share=0.2, clip_norm=0.0)
    cfg = Config(scorer=scorer, dim=D, loss="margin", rivals="per-query", candidates=2, n3=0.0, optim=optim)
    model = GraphEmbedding(scorer, D, N, R, N + 8)
    tables = model.init(jax.random.key(0))
    tx = make_optimizer(optim, 10)
    dense = jax.jit(make_step(lambda t, c, b, key: structure_loss(cfg, model, t, b), tx, jax.random.key(1)))
    sparse = jax.jit(make_sparse_step(cfg, model, 10), donate_argnums=0)
    with jax.numpy_dtype_promotion("standard"):
        state = TrainState(jnp.zeros((), jnp.int32), tables, tx.init(tables))
    small = init_sparse(jax.tree.map(jnp.copy, tables))
    rng = np.random.default_rng(0)
    draw = lambda shape, high=N: rng.integers(0, high, shape).astype(np.int32)  # noqa: E731
    for _ in range(4):
        weight = np.append(np.ones((15, 1), np.float32), np.zeros((1, 1), np.float32), axis=0)
        links = LinkBatch(draw(16, 9), draw(16, 2 * R), draw((16, 1)), weight, draw((16, 2)))
        state, told = dense(state, {}, links)
        small, said = sparse(small, {}, sparse_batch(links, model.entity_rows))
        assert said.keys() <= told.keys()  # the learning rate is that of the tables
        np.testing.assert_allclose(said["loss"][0], told["loss"][0], rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), small.params, state.params)
    assert int(small.step) == 4 and small.opt_state.sum_of_squares["entity"]["embedding"].shape == (N + 8, 1)
    moved = np.abs(np.asarray(small.params["entity"]["embedding"] - tables["entity"]["embedding"])).max(axis=1)
    assert (moved[N:] == 0).all() and (moved[:N] > 0).any()


def test_what_a_step_on_rows_in_use_cannot_do():
    cfg = Config(scorer="rotate", dim=D, loss="margin", rivals="per-query")
    model = GraphEmbedding("rotate", D, N, R, N)
    with pytest.raises(KgrecError, match="graph.loss: found 'softmax'"):
        make_sparse_step(dataclasses.replace(cfg, loss="softmax", rivals="all"), model, 10)
    with pytest.raises(KgrecError, match="graph.scorer: found 'tucker'"):
        make_sparse_step(cfg, dataclasses.replace(model, scorer_name="tucker"), 10)
    links = LinkBatch(*(np.array(x, np.int32) for x in ([5, 5], [0, 1], [[7], [5]])), np.ones((2, 1), np.float32),
                      np.array([[9], [7]], np.int32))
    batch = sparse_batch(links, N)
    assert batch.rows.tolist() == [5, 7, 9, N, N, N]
    assert batch.links.head.tolist() == [0, 0] and batch.links.candidates.tolist() == [[2], [1]]
