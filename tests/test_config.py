"""Configs: found from any folder, read with errors of one line; their fields as arguments name them; the run folder."""

import dataclasses
import json
import pathlib
import tomllib
import typing

import pytest

from kgrec_jax import config, workdir
from kgrec_jax.config import Experiment, check_arguments, fields_of, find_config, load_config, shipped_configs
from kgrec_jax.data.folder import write_folder
from kgrec_jax.data.toy import toy_world
from kgrec_jax.errors import KgrecError
from kgrec_jax.tracking import write_json
from kgrec_jax.workdir import Run

ROOT = pathlib.Path(__file__).resolve().parents[1]
FIELDS = fields_of(Experiment)
HEAD = "from kgrec_jax.config import Experiment\nfrom kgrec_jax.stages import fuse\n\n\ndef get_config():\n"


def test_shipped_configs_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert {"default", "quickstart"} <= shipped_configs().keys()
    for name in ("default", "default.py", "configs/default.py"):
        assert find_config(name).parent.name == "configs"
    (tmp_path / "default").write_text("x = 1\n")
    assert find_config("default") == pathlib.Path("default")  # a file of that name comes first
    for absent in ("nothing", "elsewhere/default.py"):
        with pytest.raises(KgrecError, match="found no file .*expected a path or a shipped config: default, .*quick"):
            find_config(absent)


def test_every_shipped_config_is_an_experiment():
    assert all(isinstance(load_config(name), Experiment) for name in shipped_configs())


def test_quickstart_is_short_and_counted_in_steps():
    quick = load_config("quickstart")
    assert quick.data.path == "pypi:recbole==1.2.1#recbole/dataset_example/ml-100k" and quick.data.name == "ml-100k"
    assert (quick.data.split.kind, quick.data.split.cold_share) == ("random", 0.1)
    assert quick.pretrain.head_steps + quick.pretrain.steps <= 60
    assert 0 < quick.graph.text_steps <= 200 and (quick.graph.text_batch, quick.graph.text_length) == (32, 32)
    assert 0 < quick.graph.steps <= 600


@pytest.mark.parametrize("body, words", [
    (HEAD + "    return Experiment(sed=1)\n", r":6: found TypeError: .*'sed'.*expected a get_config\(\)"),
    (HEAD + "    return (Experiment(\n", r":6: found a syntax error"),
    (HEAD + "    return 5\n", "returns int, expected Experiment"),
    (HEAD + "    return Experiment\n", "returns type, expected Experiment"),
    (HEAD + "    return Experiment(fuse=fuse.Config(steps='many'))\n", "fuse.steps: found 'many', expected int"),
    (HEAD + "    return Experiment(fuse=3)\n", "fuse.tower.width: found None, expected int"),
    ("import kgrec_jax.no_such_module\n", ":1: found ModuleNotFoundError"),
    ("x = 1\n", r"found no get_config\(\)"),
    ("get_config = 5\n", r"returns NoneType, expected Experiment"),
])
def test_config_files_that_are_wrong(tmp_path, body, words):
    file = tmp_path / "mine.py"
    file.write_text(body)
    with pytest.raises(KgrecError, match=words) as error:
        load_config(str(file))
    assert str(error.value).startswith(str(file)) and "\n" not in str(error.value)


def test_fields_are_the_leaves_with_their_types():
    assert FIELDS["seed"].kind is int and FIELDS["fuse.optim.peak_lr"].kind is float
    assert FIELDS["fuse.optim.peak_lr"].flag == "--fuse.optim.peak-lr" and FIELDS["data.text_columns"].many
    assert "cold-items" in FIELDS["data.split.kind"].expected()
    known = (str, int, float)  # what check_arguments reads; bool fields would be flags without a value
    for field in FIELDS.values():
        kind = typing.get_args(field.kind)[0] if field.many else field.kind
        assert kind in known or typing.get_origin(kind) is typing.Literal, field
        assert not dataclasses.is_dataclass(field.kind)


def test_right_arguments_pass():
    check_arguments(["--seed", "1", "--mesh.data", "-1", "--fuse.optim.peak-lr=1e-3", "--fuse.optim.peak_lr", "3",
                     "--data.split.kind", "time", "--data.text-columns", "a", "b", "--data.text_columns",
                     "--data.path", "a folder"], FIELDS)


@pytest.mark.parametrize("words, said", [
    (["--fuse.steps", "abc"], "--fuse.steps: found 'abc', expected int"),
    (["--fuse.steps", "3.5"], "--fuse.steps: found '3.5', expected int"),
    (["--fuse.optim.peak-lr", "nan"], "--fuse.optim.peak-lr: found 'nan', expected float"),
    (["--seed"], "--seed: found no value, expected int"),
    (["--seed", "--name", "x"], "--seed: found no value, expected int"),
    (["--seed="], "--seed: found '', expected int"),
    (["--data.split.kind", "tme"], "--data.split.kind: found 'tme', expected one of auto, random,"),
    (["--fuse.stepz", "3"], "--fuse.stepz: unknown field, expected one of the fields of fuse; "
                            "did you mean --fuse.steps?"),
    (["--steps", "3"], "did you mean --pretrain.steps or --graph.steps or --fuse.steps?"),
    (["--nonsense", "3"], "--nonsense: unknown field, expected a field of the config; kgrec run CONFIG --help lists"),
    (["--data.split", "random"], "--data.split: found a group of fields, expected one in it: kind, seed,"),
    (["--seed", "1", "2"], "arguments: found '2', expected --FIELD VALUE"),
    (["-v"], "arguments: found '-v', expected --FIELD VALUE"),
])
def test_wrong_arguments_are_named(words, said):
    with pytest.raises(KgrecError) as error:
        check_arguments(words, FIELDS)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_the_wheel_holds_every_package_and_the_configs():
    held = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    on_disk = {".".join(file.parent.relative_to(ROOT).parts) for file in ROOT.glob("kgrec_jax/**/__init__.py")}
    configs = {"kgrec_jax.configs", *(f"kgrec_jax.configs.{folder.name}" for folder in (ROOT / "configs").iterdir()
                                      if folder.is_dir() and any(folder.glob("*.py")))}
    assert set(held["packages"]) == on_disk | configs
    assert held["package-dir"] == {"kgrec_jax.configs": "configs"}


def test_configs_inside_a_wheel_are_found_beside_config_py(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "kgrec_jax"
    for folder in (package / "configs", package.parent / "configs"):  # the second is somebody else's
        folder.mkdir(parents=True)
    (package / "configs" / "ours.py").write_text("")
    (package.parent / "configs" / "theirs.py").write_text("")
    monkeypatch.setattr(config, "__file__", str(package / "config.py"))
    assert list(shipped_configs()) == ["ours"]


# --- the run folder -----------------------------------------------------------------------------------------------


@pytest.fixture
def spoken(monkeypatch):
    """What a run says."""
    lines = []
    monkeypatch.setattr("kgrec_jax.tracking.Tracker.say", lambda self, text: lines.append(text))
    return lines


def test_run_folder_records_the_machine(tmp_path, spoken):
    Run.open(tmp_path / "run", Experiment())
    held = json.loads((tmp_path / "run" / "experiment.json").read_text())
    assert held["devices"].startswith("8 x ") and held["mesh"] == {"data": 8, "model": 1}
    assert held["jax"].count(".") >= 2 and held["cpu_threads"] >= 1
    Run.open(tmp_path / "run", Experiment())
    assert spoken == []


def test_another_machine_is_said_in_one_line(tmp_path, spoken, monkeypatch):
    run = Run.open(tmp_path / "run", Experiment())
    run.finish("pretrain", {})
    real = workdir._machine
    monkeypatch.setattr(workdir, "_machine", lambda experiment: real(experiment) | {"cpu_threads": 77})
    Run.open(tmp_path / "run", Experiment(mesh=config.MeshConfig(data=4, model=2)))
    assert len(spoken) == 1 and "cpu threads 77 instead of" in spoken[0] and "the last bits" in spoken[0]
    assert "mesh data 4, model 2 instead of data 8, model 1" in spoken[0]
    assert not run.finished
    run.finish("fuse", {})
    write_json(run.path / "report.json", {})
    assert run.finished
    Run.open(tmp_path / "run", Experiment())  # nothing is computed any more
    assert len(spoken) == 1


def test_what_may_differ_when_a_run_goes_on(tmp_path, spoken):
    Run.open(tmp_path / "run", Experiment()).finish("pretrain", {})
    quieter = dataclasses.replace(Experiment().fuse, log_every=7)
    moved = dataclasses.replace(Experiment().data, path="elsewhere")
    Run.open(tmp_path / "run", Experiment(fuse=quieter, data=moved))
    with pytest.raises(KgrecError, match="another seed, expected the same config"):
        Run.open(tmp_path / "run", Experiment(seed=1))


def test_a_mistake_before_anything_was_computed_costs_no_folder(tmp_path, spoken):
    write_folder(toy_world(num_users=20, num_items=24), tmp_path / "toy")
    data = config.DataConfig(path=str(tmp_path / "absent"))
    with pytest.raises(KgrecError, match="no such folder"):
        Run.open(tmp_path / "run", Experiment(seed=1, data=data)).dataset  # noqa: B018
    right = Experiment(data=dataclasses.replace(data, path=str(tmp_path / "toy")))
    run = Run.open(tmp_path / "run", right)
    assert run.dataset.num_users == 20 and len(run.split.train)
    assert json.loads((tmp_path / "run" / "experiment.json").read_text())["config"]["seed"] == 0
    with pytest.raises(KgrecError, match="another seed"):
        Run.open(tmp_path / "run", dataclasses.replace(right, seed=2))
    write_folder(toy_world(num_users=21, num_items=24), tmp_path / "other")
    other = dataclasses.replace(right, data=dataclasses.replace(data, path=str(tmp_path / "other")))
    with pytest.raises(KgrecError, match="found other data than the run"):
        Run.open(tmp_path / "run", other).dataset  # noqa: B018


@pytest.mark.parametrize("text, words", [
    ('{"format_version": 1, "con', "found a damaged file"), ("[1]", "found a JSON list, expected an object"),
    ('{"format_version": 1}', "found no config"), ('{"format_version": 99, "config": {}}', "found format version 99")])
def test_a_damaged_experiment_json_is_one_line(tmp_path, text, words):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "experiment.json").write_text(text)
    with pytest.raises(KgrecError, match=words) as error:
        Run.open(folder, Experiment())
    assert "\n" not in str(error.value) and (folder / "experiment.json").read_text() == text


def test_folders_that_are_no_runs(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(KgrecError, match="found a file, expected a run folder"):
        Run.open(tmp_path / "file", Experiment())
    with pytest.raises(KgrecError, match="found no way to make the folder"):
        Run.open(tmp_path / "file" / "run", Experiment())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".experiment.json.1.tmp").write_text("")  # of a run killed at its very beginning
    Run.open(tmp_path / "other", Experiment())
    (tmp_path / "third").mkdir()
    (tmp_path / "third" / "thesis.txt").write_text("")
    with pytest.raises(KgrecError, match="found files but no experiment.json"):
        Run.open(tmp_path / "third", Experiment())
