"""The command line: what each command hands on, what it says, and one clear line for every mistake."""

import errno
import re
import subprocess
import sys

import pytest

from kgrec_jax import cli, pipeline
from kgrec_jax.data import sources
from kgrec_jax.errors import Interrupted, KgrecError


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """An empty cache, no package index, and a folder of its own to stand in."""
    monkeypatch.setenv("KGREC_CACHE", str(tmp_path / "cache"))
    offline = [("pip", [sys.executable, "-c", "raise SystemExit('offline')"])]
    monkeypatch.setattr(sources, "_fetchers", lambda *args: offline)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def calls(monkeypatch):
    """What reached the pipeline: (function, positional arguments, keywords)."""
    made = []
    for name in ("run", "evaluate_run", "refit"):
        monkeypatch.setattr(pipeline, name, lambda *args, _name=name, **more: made.append((_name, args, more)))
    return made


def wrong(argv, capsys):
    """The one line that a wrong command ends with."""
    assert cli.main([str(word) for word in argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("kgrec: ") and err.count("\n") == 1 and "Traceback" not in err, err
    return err


# --- help ---------------------------------------------------------------------------------------------------------


def test_help_lists_every_command_and_loads_nothing_heavy():
    code = ("import sys; from kgrec_jax.cli import main; assert main(['--help']) == 0; "
            "assert not {'jax', 'numpy', 'tyro', 'transformers', 'pyarrow'} & sys.modules.keys()")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for name, line in cli.SUMMARIES.items():
        assert re.search(rf"^  {name} +{re.escape(line)}$", done.stdout, re.MULTILINE)
    assert "kgrec quickstart" in done.stdout and cli.main([]) == 0


@pytest.mark.parametrize("argv", [["run"], ["pretrain"], ["graph"], ["fuse"], ["evaluate"], ["refit"], ["recommend"],
                                  ["complete"], ["data"], ["data", "check"], ["data", "import"]])
def test_help_of_each_command_has_an_example(argv, capsys):
    try:
        assert cli.main([*argv, "--help"]) == 0
    except SystemExit as end:  # argparse ends by itself
        assert end.code == 0
    out, err = capsys.readouterr()
    assert f"\n  kgrec {' '.join(argv)} " in out and err == "" and max(map(len, out.splitlines())) <= 130


def test_help_of_a_config_lists_its_fields(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert cli.main(["run", "default", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--fuse.optim.peak-lr FLOAT" in out and "the dataset folder" in out and "--data.split.kind" in out
    assert cli.main(["quickstart", "--help"]) == 0
    assert "kgrec recommend runs/quickstart" in capsys.readouterr().out


def test_version(capsys):
    assert cli.main(["--version"]) == 0 and capsys.readouterr().out.startswith("kgrec 0.")


# --- config commands ----------------------------------------------------------------------------------------------


def test_run_hands_on_config_overrides_and_workdir(calls):
    argv = ["run", "default", "--data.path", "a", "--fuse.optim.peak-lr", "1e-3", "--workdir", "W", "--fuse.steps=7",
            "--data.text_columns", "title", "plot", "--mesh.data", "-1"]
    assert cli.main(argv) == 0
    (name, (experiment, folder), more), = calls
    assert (name, str(folder), more) == ("run", "W", {})
    assert (experiment.fuse.optim.peak_lr, experiment.fuse.steps) == (1e-3, 7)
    assert experiment.data.text_columns == ("title", "plot") and experiment.data.path == "a"


@pytest.mark.parametrize("where", range(6))
def test_workdir_may_stand_anywhere(where, calls):
    words = ["default", "--data.path", "a", "--seed", "3"]
    assert cli.main(["run", *words[:where], "--workdir=W", *words[where:]]) == 0
    assert str(calls[0][1][1]) == "W" and calls[0][1][0].seed == 3


@pytest.mark.parametrize("stage", cli.STAGES)
def test_a_stage_is_the_pipeline_up_to_it(stage, calls):
    assert cli.main([stage, "default", "--data.path", "a", "--workdir", "W"]) == 0
    assert calls[0][0] == "run" and calls[0][2] == {"until": stage}


def test_evaluate_and_refit(calls, capsys):
    assert cli.main(["evaluate", "R"]) == 0 and cli.main(["refit", "R", "O"]) == 0
    assert [(name, [str(a) for a in args], more) for name, args, more in calls] == [
        ("evaluate_run", ["R"], {"quiet": False}), ("refit", ["R", "O"], {"quiet": False})]
    assert "the run itself" in wrong(["refit", "R", "./R"], capsys)


def test_quickstart_is_its_config_with_every_notice_once(calls, capsys, monkeypatch):
    asked = []

    def fetched(source, say):
        asked.append(source)
        for line in sources.notices(source):  # as after a download
            say(line)

    monkeypatch.setattr(sources, "resolve", fetched)
    for argv, folder in ((["quickstart", "--seed", "5"], "runs/quickstart"), (["quickstart", "--workdir", "W"], "W"),
                         (["run", "quickstart", "--workdir", "V"], "V")):
        assert cli.main(argv) == 0
        assert str(calls[-1][1][1]) == folder and calls[-1][1][0].data.name == "ml-100k"
        err = capsys.readouterr().err.splitlines()
        assert len(err) == len(set(err)) == 4 and sum(line.startswith("cite: ") for line in err) == 2
    assert calls[0][1][0].seed == 5 and len(asked) == 6
    assert cli.main(["quickstart", "--data.path", "mine"]) == 0
    assert not any("MovieLens" in line for line in capsys.readouterr().err.splitlines())


def test_quickstart_without_a_network_names_the_file(capsys, calls):
    assert cli.main(["quickstart"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("kgrec: pypi:recbole==1.2.1") and "recbole-1.2.1-py3-none-any.whl" in last and not calls


@pytest.mark.parametrize("argv, words", [
    (["nonsense"], "COMMAND: found 'nonsense', expected one of quickstart, run,"),
    (["run"], "CONFIG: found none, expected a config first"),
    (["run", "--seed", "1"], "CONFIG: found --seed"),
    (["run", "nothing", "--workdir", "W"], "expected a path or a shipped config: default, "),
    (["run", "default"], "--workdir: found none"),
    (["run", "default", "--workdir"], "--workdir: found no value"),
    (["run", "default", "--workdir", "W"], "--data.path: found none"),
    (["run", "default", "--workdir", "W", "--fuse.steps", "abc"], "kgrec: --fuse.steps: found 'abc', expected int"),
    (["graph", "default", "--graph.dims", "3"], "did you mean --graph.dim?"),
    (["recommend"], "RUN: found none"),
    (["recommend", "R"], "arguments: found none, expected exactly one of --user, --history, --query, --all-users"),
    (["recommend", "R", "--user", "a", "--query", "b"], "found --user and --query, expected exactly one"),
    (["recommend", "R", "--all-users"], "--out: found none"),
    (["recommend", "R", "--user", "a", "--out", "f"], "--out: found f with --user"),
    (["recommend", "R", "--all-users", "--out", "f", "--json"], "--json: found with --all-users"),
    (["recommend", "R", "--user", "a", "-k", "0"], "-k: found '0', expected a whole number of at least 1"),
    (["recommend", "R", "--user", "a", "-k", "ten"], "-k: found 'ten', expected"),
    (["recommend", "R", "--user"], "--user: found no value"),
    (["recommend", "R", "--usr", "a"], "--usr: unknown argument"),
    (["recommend", "R", "--user", "a", "--candidates", "absent.txt"], "--candidates: found no such file"),
    (["recommend", "absent", "--user", "a"], "absent"),
    (["data", "nonsense"], "data: found 'nonsense', expected check or import"),
    (["data", "check", "absent"], "no such folder"),
    (["data", "check", "a", "--encoder", "b", "--no-encoder"], "--no-encoder"),
    (["data", "import", "excel", "a", "b"], "kind: found 'excel', expected one of"),
    (["data", "import", "csv", "absent", "b"], "no such file or folder"),
    (["data", "import", "csv", ".", "b", "--split", "absent"], "--split: found no folder absent"),
    (["data", "import", "csv", ".", "b", "--links", "keep"], "--links: found keep for csv"),
])
def test_mistakes_are_one_line(argv, words, capsys):
    extra = [] if argv[:2] != ["data", "check"] or "--encoder" in argv else ["--no-encoder"]
    assert words in wrong([*argv, *extra], capsys)


@pytest.mark.parametrize("error, code, words", [
    (PermissionError(errno.EACCES, "Permission denied", "/runs/x"), 2, "kgrec: /runs/x: Permission denied"),
    (OSError(errno.ENOSPC, "No space left on device"), 2, "kgrec: writing: No space left on device"),
    (Interrupted("stopped; go on with the same command"), 130, "kgrec: stopped"),
    (KeyboardInterrupt(), 130, "kgrec: interrupted"), (KgrecError("a: found b"), 2, "kgrec: a: found b")])
def test_what_a_run_may_end_with(error, code, words, monkeypatch, capsys):
    def fail(*args, **more):
        raise error

    monkeypatch.setattr(pipeline, "run", fail)
    assert cli.main(["run", "default", "--data.path", "a", "--workdir", "W"]) == code
    err = capsys.readouterr().err
    assert err.startswith(words) and err.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError("a bug"), FileNotFoundError(errno.ENOENT, "a bug", "file")])
def test_a_bug_keeps_its_traceback(error, monkeypatch):
    def fail(*args, **more):
        raise error

    monkeypatch.setattr(pipeline, "run", fail)
    with pytest.raises(type(error)):
        cli.main(["run", "default", "--data.path", "a", "--workdir", "W"])


def test_a_closed_pipe_is_quiet():
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-m", "kgrec_jax", "--help"], **pipes) as started:
        started.stdout.close()
        assert started.stderr.read() == b"" and started.wait() == 0


def test_what_tyro_alone_would_refuse_is_one_line_too(monkeypatch, capsys):
    monkeypatch.setattr("kgrec_jax.config.check_arguments", lambda words, fields: None)
    line = wrong(["run", "default", "--data.path", "a", "--workdir", "W", "--fuse.steps", "abc"], capsys)
    assert "abc" in line and "─" not in line and "expected fields of the config" in line
