"""Several seeds of one experiment and several configs in one command: figures against SciPy, runs on the toy world."""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest
import scipy.stats
from tiny_encoder import make_tiny_encoder

from kgrec_jax import cli, pipeline, seeds
from kgrec_jax.config import load_config, to_json
from kgrec_jax.data import folder as folders
from kgrec_jax.data.folder import DataConfig, expanded, write_folder
from kgrec_jax.data.importers import auto
from kgrec_jax.data.interactions import SplitConfig
from kgrec_jax.data.toy import toy_world
from kgrec_jax.errors import Interrupted, KgrecError
from kgrec_jax.evaluation.report import Report, read_report
from kgrec_jax.evaluation.seeds import PerUser, markdown, spread, summarise
from kgrec_jax.stages import fuse, graph
from kgrec_jax.workdir import Run, differences

CONFIG = """
from kgrec_jax.config import Experiment
from kgrec_jax.data.folder import DataConfig
from kgrec_jax.models.towers import TowerConfig
from kgrec_jax.stages import fuse, graph, pretrain
from kgrec_jax.stages.fuse_gate import GateConfig


def get_config():
    return Experiment(
        encoder={encoder!r}, data=DataConfig(path={data!r}), pretrain=pretrain.Config(mode="off"),
        graph=graph.Config(dim=8, steps=4, batch=32, encoder_mode="off"),
        fuse=fuse.Config(tower=TowerConfig(width=16, max_history=8), steps=4, batch=16, text_length=16,
                         gate=GateConfig(steps=4, batch=16)))
"""


# --- figures ------------------------------------------------------------------------------------------------------


def test_a_spread_is_students_interval():
    values = np.random.default_rng(0).normal(0.3, 0.01, 5)
    found = spread(values.tolist())
    assert found["mean"] == pytest.approx(values.mean()) and found["n"] == 5
    assert found["deviation"] == pytest.approx(np.std(values, ddof=1))
    low, high = scipy.stats.t.interval(0.95, 4, loc=values.mean(), scale=scipy.stats.sem(values))
    assert found["ci95"] == pytest.approx([low, high]) and found["values"] == values.tolist()
    assert spread([0.2]) == {"mean": 0.2, "deviation": None, "ci95": None, "n": 1, "values": [0.2]}
    assert spread([0.2, 0.2])["ci95"] == pytest.approx([0.2, 0.2])  # a row that draws nothing


def test_students_interval_holds_what_it_promises():
    """Of means of three normal figures, the intervals of 95 % hold the true one; a normal's 1.96 would hold 81 %."""
    draws = np.random.default_rng(1).normal(size=(2000, 3))
    found = [spread(row.tolist())["ci95"] for row in draws]
    assert np.mean([low <= 0 <= high for low, high in found]) == pytest.approx(0.95, abs=0.015)


def made(models, **more):
    """A report with the metrics of some rows."""
    fields = dict(name="toy", split="random", fit_on="train+valid", history="train+valid", candidates=9, users=4,
                  models=models, paired={}, reference="fusion", link_prediction={}, timing={}, skipped={}, example={})
    return Report(**fields | more)


def drawn(seed, users, shift=0.0):
    """`PerUser` of three rows, fusion ahead by `shift`."""
    rng = np.random.default_rng(seed)
    values = {name: {metric: rng.random(len(users)) for metric in ("ndcg@10", "recall@20")}
              for name in ("popularity", "ease", "fusion")}
    values["ease"] = {m: v + 0.2 for m, v in values["ease"].items()}
    values["fusion"] = {m: values["ease"][m] + shift + 0.01 * rng.random(len(users)) for m in values["ease"]}
    return PerUser(np.asarray(users, np.int32), values)


def entries(one):
    return {name: {**{m: float(v.mean()) for m, v in of.items()}, "ci95": {}, "users": len(one.users),
                   "cold": {"ndcg@10": 0.1}} for name, of in one.values.items()}


def test_fusion_is_paired_with_the_best_row_over_users_who_count_once(tmp_path):
    runs = [drawn(seed, range(40), 0.03) for seed in range(3)]
    found = summarise([5, 6, 7], [made(entries(one)) for one in runs], runs)
    difference = np.stack([one.values["fusion"]["ndcg@10"] - one.values["ease"]["ndcg@10"] for one in runs])  # [S, n]
    own = found["paired"]["ndcg@10"]
    assert own["row"] == "ease" and own["users"] == 40
    assert own["difference"] == pytest.approx(difference.mean())
    assert own["standard_error"] == pytest.approx(scipy.stats.sem(difference.mean(axis=0)))
    assert own["seed_deviation"] == pytest.approx(difference.mean(axis=1).std(ddof=1))
    means = [one.values["ease"]["recall@20"].mean() for one in runs]
    assert found["models"]["ease"]["recall@20"]["values"] == pytest.approx(means)
    assert found["models"]["fusion"]["cold"]["ndcg@10"]["mean"] == pytest.approx(0.1)
    words = markdown(found)
    assert "Student's t" in words and "bootstrap intervals over users" in words and "## Among cold items" in words
    assert f"fusion minus ease, the best of the others: {own['difference']:+.4f} ± {own['standard_error']:.4f}" in (
        words)
    assert json.loads(json.dumps(found)) == found  # nothing that JSON lacks


def test_users_whom_not_every_seed_measured_do_not_count():
    runs = [drawn(0, [1, 3, 5, 9]), drawn(1, [9, 2, 5, 3])]
    own = summarise([0, 1], [made(entries(one)) for one in runs], runs)["paired"]["ndcg@10"]
    rows = ([1, 2, 3], [3, 2, 0])  # of the users 3, 5, 9
    each = [one.values["fusion"]["ndcg@10"][r] - one.values["ease"]["ndcg@10"][r] for one, r in zip(runs, rows)]
    assert own["users"] == 3 and own["standard_error"] == pytest.approx(scipy.stats.sem(np.mean(each, axis=0)))
    runs = [drawn(0, [1, 2]), drawn(1, [3, 4])]
    assert summarise([0, 1], [made(entries(one)) for one in runs], runs)["paired"] == {}


def test_a_row_that_a_seed_lacks_and_a_single_seed():
    runs = [drawn(seed, range(5)) for seed in range(2)]
    reports = [made(entries(one)) for one in runs]
    del reports[1].models["ease"], runs[1].values["ease"]
    found = summarise([0, 1], reports, runs)
    assert found["models"]["ease"]["ndcg@10"]["n"] == 1 and found["paired"]["ndcg@10"]["row"] == "popularity"
    alone = summarise([3], reports[:1], runs[:1])
    assert alone["paired"]["ndcg@10"]["seed_deviation"] is None and "1 seed\n" in markdown(alone)


def test_metrics_of_users_are_saved_and_a_damaged_file_is_named(tmp_path):
    one = drawn(0, range(6))
    one.save(tmp_path / "per_user.npz")
    held = PerUser.load(tmp_path / "per_user.npz")
    np.testing.assert_array_equal(held.users, one.users)
    assert {n: list(of) for n, of in held.values.items()} == {n: list(of) for n, of in one.values.items()}
    np.testing.assert_array_equal(held.values["ease"]["ndcg@10"], one.values["ease"]["ndcg@10"])
    (tmp_path / "per_user.npz").write_bytes(b"PK")
    for words in ("found a damaged file", "found no such file"):
        with pytest.raises(KgrecError, match=f"{words}.*kgrec evaluate"):
            PerUser.load(tmp_path / "per_user.npz")
        (tmp_path / "per_user.npz").unlink(missing_ok=True)


# --- runs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made_of(tmp_path_factory):
    """(folder with data and encoder, experiment)."""
    root = tmp_path_factory.mktemp("seeds")
    world = toy_world(num_users=40, num_items=30)
    write_folder(world, root / "toy")
    encoder = make_tiny_encoder(root / "bert", [*world.item_texts, *world.graph.entity_names])
    (root / "one.py").write_text(CONFIG.format(encoder=str(encoder), data=str(root / "toy")))
    return root, load_config(str(root / "one.py"))


@pytest.fixture(scope="module")
def twice(made_of):
    """(experiment, folder, what it found, how often the data were read) of two seeds by the command line."""
    root, experiment = made_of
    read, patch = [], pytest.MonkeyPatch()
    real = folders.read_folder
    patch.setattr(auto, "read_folder", lambda *args: read.append(args) or real(*args))
    assert cli.main(["run", str(root / "one.py"), "--workdir", str(root / "W"), "--seeds", "2", "--seed", "4"]) == 0
    patch.undo()
    return dataclasses.replace(experiment, seed=4), root / "W", len(read)


def test_two_seeds_are_two_runs_on_data_read_once(twice):
    experiment, folder, read = twice
    assert read == 1
    held = json.loads((folder / "seeds.json").read_text())
    assert held["seeds"] == [4, 5] and (folder / "seeds.md").read_text().startswith("# toy, 2 seeds\n")
    reports = [read_report(folder / f"seed-{seed}") for seed in (4, 5)]
    for name, entry in held["models"].items():
        for metric in ("ndcg@10", "recall@20", "ndcg@20", "gini@10"):
            assert entry[metric]["values"] == [report.models[name][metric] for report in reports]
    assert held["models"]["popularity"]["ndcg@10"]["deviation"] == 0 < held["models"]["fusion"]["ndcg@10"]["deviation"]
    best = held["paired"]["ndcg@10"]["row"]
    each = [report.paired[best]["ndcg@10"]["difference"] for report in reports]
    assert held["paired"]["ndcg@10"]["difference"] == pytest.approx(np.mean(each))
    configs = [json.loads((folder / f"seed-{seed}" / "experiment.json").read_text())["config"] for seed in (4, 5)]
    assert differences(*configs) == ["seed"] and configs[0] == json.loads(json.dumps(to_json(experiment)))
    parts = [(folder / f"seed-{seed}" / "split" / "train.tsv").read_bytes() for seed in (4, 5)]
    assert parts[0] == parts[1]


@pytest.mark.slow
def test_a_further_seed_is_what_it_would_be_by_itself(twice, tmp_path):
    experiment, folder, _ = twice
    alone = pipeline.run(dataclasses.replace(experiment, seed=5), tmp_path / "alone", quiet=True)
    assert alone.models == read_report(folder / "seed-5").models
    for name in ("dataset.json", "split/split.json"):
        assert (tmp_path / "alone" / name).read_bytes() == (folder / "seed-5" / name).read_bytes()


def test_what_is_finished_is_read_and_what_was_broken_off_goes_on(twice, tmp_path, monkeypatch, capsys):
    experiment, folder, _ = twice
    shutil.copytree(folder, tmp_path / "W")
    workdir = tmp_path / "W"
    before = (workdir / "seeds.json").read_bytes()
    (workdir / "seeds.json").unlink()
    for name in ("report.json", "fuse/done.json"):  # as killed in the report of the second seed
        (workdir / "seed-5" / name).unlink()
    trained = []
    monkeypatch.setattr(graph, "run", lambda *args: trained.append(args))
    real = fuse.run
    monkeypatch.setattr(fuse, "run", lambda of, *args: trained.append(of.seed) or real(of, *args))
    seeds.run(experiment, workdir, 2)
    assert trained == [5] and (workdir / "seeds.json").read_bytes() == before
    assert "fusion" in capsys.readouterr().out
    seeds.run(experiment, workdir, 1, quiet=True)
    assert trained == [5] and json.loads((workdir / "seeds.json").read_text())["seeds"] == [4]
    assert (workdir / "seed-5" / "report.json").is_file()


def test_ctrl_c_ends_all_of_it(twice, tmp_path, monkeypatch):
    def stop(*args, **more):
        raise Interrupted("stopped")

    experiment, _, _ = twice
    monkeypatch.setattr(graph, "run", stop)
    with pytest.raises(Interrupted, match="^stopped$"):
        seeds.run(experiment, tmp_path / "W", 2, quiet=True)
    assert not (tmp_path / "W" / "seed-5").exists()


def told(argv, capsys, code=2):
    """The last line on the standard error of a command that ends with `code`."""
    assert cli.main([str(word) for word in argv]) == code
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err.splitlines()[-1]


def test_bad_values_of_seeds(made_of, twice, tmp_path, capsys):
    root, experiment = made_of
    for bad in ("0", "-1", "two", "1.5"):
        line = told(["run", root / "one.py", "--workdir", tmp_path / "W", "--seeds", bad], capsys)
        assert line == f"kgrec: --seeds: found {bad!r}, expected a whole number of at least 1"
    assert "--seeds: found no value" in told(["run", root / "one.py", "--workdir", tmp_path / "W", "--seeds"], capsys)
    assert "--seeds: unknown field" in told(["graph", root / "one.py", "--workdir", "W", "--seeds", "2"], capsys)
    assert not (tmp_path / "W").exists()
    single = twice[1] / "seed-4"
    line = told(["run", root / "one.py", "--workdir", single, "--seeds", "2"], capsys)
    assert "found a run of one seed" in line and not (single / "seed-0").exists()
    line = told(["run", root / "one.py", "--workdir", tmp_path / "W", "--seeds", "2", "--data.split.test-share", "0"],
                capsys)
    assert "seed 0: nothing is held out" in line and not (tmp_path / "W" / "seed-0" / "graph").exists()
    line = told(["run", root / "one.py", "--workdir", twice[1], "--seeds", "2", "--seed", "4", "--fuse.steps", "5"],
                capsys)
    assert "seed 4: " in line and "another fuse.steps" in line


def test_a_config_that_fails_is_told_at_the_end_and_the_others_run(made_of, tmp_path, monkeypatch, capsys):
    root, experiment = made_of
    text = (root / "one.py").read_text()
    (tmp_path / "lost.py").write_text(text.replace(str(root / "toy"), str(tmp_path / "absent")))
    (tmp_path / "two.py").write_text(text)
    ran = []
    monkeypatch.setattr(pipeline, "run", lambda experiment, folder, **more: ran.append((experiment, folder)) or (
        Run.open(folder, experiment, quiet=True).dataset))
    argv = ["run", root / "one.py", tmp_path / "lost.py", "nothing", tmp_path / "two.py", "--workdir", tmp_path / "W"]
    assert cli.main([str(word) for word in [*argv, "--seed", "3"]]) == 2
    *_, first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"kgrec: {tmp_path / 'lost.py'}: data.path: found no such folder")
    assert second.startswith("kgrec: nothing: CONFIG: found no file 'nothing'")
    assert [(e.seed, folder.name) for e, folder in ran] == [(3, "one"), (3, "lost"), (3, "two")]
    assert all((tmp_path / "W" / name / "dataset.json").is_file() for name in ("one", "two"))
    wrong = [*argv, "--no-such", "3"]
    assert "--no-such: unknown field" in told(wrong, capsys) and len(ran) == 3
    assert "both be left in" in told(["run", root / "one.py", "a/one.py", "--workdir", tmp_path / "V"], capsys)
    assert "--workdir: found none" in told(["run", root / "one.py", tmp_path / "two.py"], capsys)
    (tmp_path / "experiment.json").write_text("{}")
    assert "found the run of one config" in told([*argv[:-1], tmp_path], capsys)
    assert cli.main([str(word) for word in [*argv, "--help"]]) == 0 and "--fuse.steps" in capsys.readouterr().out


def test_several_configs_of_several_seeds(made_of, tmp_path, monkeypatch):
    root, _ = made_of
    (tmp_path / "two.py").write_text((root / "one.py").read_text())
    ran = []
    monkeypatch.setattr(seeds, "run", lambda experiment, folder, count: ran.append((folder, count)))
    assert cli.main(["run", str(root / "one.py"), str(tmp_path / "two.py"), "--workdir", "W", "--seeds=3"]) == 0
    assert ran == [(pathlib.Path("W/one"), 3), (pathlib.Path("W/two"), 3)]


# --- where the data are -------------------------------------------------------------------------------------------


def test_variables_of_a_path(made_of, tmp_path, monkeypatch, capsys):
    root, _ = made_of
    monkeypatch.setenv("KGREC_DATA", str(root))
    for path in ("$KGREC_DATA/toy", "${KGREC_DATA}/toy"):
        assert expanded(path) == root / "toy"
        data = auto.read_dataset(DataConfig(path=path))
        assert data.name == "toy" and data.num_users == 40
    monkeypatch.delenv("KGREC_DATA")
    line = told(["run", root / "one.py", "--workdir", tmp_path / "W", "--data.path", "$KGREC_DATA/toy"], capsys)
    assert line == ("kgrec: data.path: found $KGREC_DATA/toy, but KGREC_DATA is not set, expected a variable of the "
                    "environment; export KGREC_DATA=FOLDER, or give --data.path")
    (tmp_path / "a$b").mkdir()
    assert expanded(str(tmp_path / "a$b")) == tmp_path / "a$b"


def test_a_list_of_items_is_found_beside_the_data(made_of, tmp_path, monkeypatch):
    root, experiment = made_of
    shutil.copytree(root / "toy", tmp_path / "toy")
    item = toy_world(num_users=40, num_items=30).item_ids[2]
    (tmp_path / "toy" / "cold.txt").write_text(f"{item}\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("KGREC_DATA", str(tmp_path))
    data = DataConfig(path="$KGREC_DATA/toy", split=SplitConfig(kind="cold-items", items="cold.txt"))
    run = Run.open(tmp_path / "run", dataclasses.replace(experiment, data=data), quiet=True)
    assert [run.dataset.item_ids[row] for row in run.split.cold_items] == [item]
    (tmp_path / "elsewhere" / "mine.txt").write_text(f"{item}\n")  # from the working folder, as any path
    split = auto.split_config(dataclasses.replace(data, split=dataclasses.replace(data.split, items="mine.txt")))
    assert pathlib.Path(split.items).resolve() == tmp_path / "elsewhere" / "mine.txt"


@pytest.mark.parametrize("name", ["ml100k_recbole", "lastfm_dbpedia", "ml1m_dbpedia", "movietweetings_cold",
                                  "ml100k_cold"])
def test_a_bench_config_is_the_default_with_other_data(name):
    found = load_config(f"bench/{name}")
    changed = differences(to_json(load_config("default")), to_json(found))
    assert set(changed) <= {"name", "data.path", "data.split.kind", "data.split.items"} and found.name == name
    assert found.data.path.startswith("$KGREC_DATA/")
