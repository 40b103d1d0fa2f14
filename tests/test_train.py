"""The loop: it learns, goes on bit for bit after a kill, stops when asked, and keeps the best."""

import json
import os
import signal
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kgrec_jax.checkpoint import load_part
from kgrec_jax.data import loader
from kgrec_jax.errors import Interrupted, KgrecError
from kgrec_jax.losses import masked_mean, table_cross_entropy
from kgrec_jax.optim import OptimConfig, make_optimizer
from kgrec_jax.sharding import TABLE, MeshConfig, P, make_mesh
from kgrec_jax.tracking import Tracker
from kgrec_jax.train import fit, stop_on_signal

RULES = ((r"table$", TABLE), (r".*", P()))


def interrupted_source():
    return Source(40, act=lambda step: os.kill(os.getpid(), signal.SIGINT) if step == 9 else None)


class Source:
    """Batches that say which row of a table goes with which query; `act` does something when a step is read."""

    def __init__(self, steps=40, rows=64, act=lambda step: None, bad_step=-1):
        self.steps, self.rows, self.act, self.bad_step = steps, rows, act, bad_step

    def __len__(self):
        return self.steps

    def __getitem__(self, step):
        self.act(step)
        ids = np.random.default_rng(step).integers(0, self.rows, 16).astype(np.int32)
        return {"query": ids, "target": ids[::-1] * 0 + (ids * 7 + 3) % self.rows,
                "scale": np.float32(np.nan if step == self.bad_step else 1.0)}


def init(key):
    k1, k2 = jax.random.split(key)
    return {"query": jax.random.normal(k1, (64, 8)), "table": jax.random.normal(k2, (64, 8))}


def loss(params, constants, batch, key):
    q = params["query"][batch["query"]] * batch["scale"] + 0.01 * jax.random.normal(key, (16, 8))
    losses = table_cross_entropy(q, params["table"], batch["target"], bias=constants["bias"])
    total, count = masked_mean(losses, jnp.ones(16))
    return total / count, {"nll": (total, count), "half": jnp.float32(0.5)}


def train(folder, steps=40, tracker=None, mesh=None, source=None, loss_fn=loss, **kwargs):
    options = dict(log_every=8, checkpoint_every=10, seed=1, label="toy") | kwargs
    tx = make_optimizer(OptimConfig(peak_lr=0.1), steps)
    return fit(workdir=folder, init_fn=init, loss_fn=loss_fn, constants={"bias": np.zeros(64, np.float32)},
               source=source or Source(steps), tx=tx, mesh=mesh or make_mesh(MeshConfig()), rules=RULES,
               tracker=tracker or Tracker(folder, quiet=True), **options)


def rows(folder):
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "examples_per_second"} for row in read]


def assert_same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def test_it_learns_and_logs(tmp_path):
    done = train(tmp_path, 120)
    logged = rows(tmp_path)
    assert done.steps == 120 and done.stopped == "end" and done.seconds > 0
    assert [r["step"] for r in logged] == list(range(8, 121, 8))
    assert logged[0]["loss"] > 4 and logged[-1]["loss"] < 1 and done.metrics["loss"] == logged[-1]["loss"]
    assert all(r["half"] == 0.5 and r["nll"] == pytest.approx(r["loss"]) and r["grad_norm"] > 0 for r in logged)
    rates = [r["learning_rate"] for r in logged]
    assert max(rates) <= 0.1 and rates[-1] < 0.01
    assert done.params["table"].sharding.spec == TABLE


def test_a_finished_run_is_read_and_not_compiled(tmp_path):
    first = train(tmp_path, 12)

    def never(*_):
        raise AssertionError("a finished run was trained")

    again = train(tmp_path, 12, source=Source(12, act=never))
    assert_same(again.params, first.params)
    assert again.metrics == first.metrics and again.steps == 12 and again.stopped == "end"
    assert [r["step"] for r in rows(tmp_path)] == [8, 12]


PROGRAM = """
import os, pathlib, signal, sys, time
import conftest
sys.path.insert(0, {tests!r})
import test_train as t
from kgrec_jax import compilation_cache
compilation_cache.enable()
folder, kill = pathlib.Path(sys.argv[1]), int(sys.argv[2])

def act(step):
    if step == kill:
        while not (folder / "checkpoints" / str(kill // 10 * 10)).is_dir():
            time.sleep(0.01)  # the loop waits for this batch, the checkpoint is written behind it
        os.kill(os.getpid(), signal.SIGKILL)

t.train(folder, source=t.Source(40, act=act), tracker=t.Tracker(folder), eval_every=9,
        evaluate=lambda p: {{"norm": float((p["table"] ** 2).sum())}})
"""


def test_after_kill_9_the_result_is_the_same_bit_for_bit(tmp_path):
    """Twice killed at steps that are neither logged nor saved, once with the compiled step read from the cache."""
    def start(folder, kill):
        tests = os.path.dirname(__file__)
        env = {**os.environ, "PYTHONPATH": tests, "KGREC_CACHE": str(tmp_path / "cache"),
               "KGREC_NO_COMPILATION_CACHE": "0"}
        return subprocess.run([sys.executable, "-c", PROGRAM.format(tests=tests), str(tmp_path / folder), str(kill)],
                              env=env, capture_output=True, text=True, timeout=300)

    assert start("whole", -1).returncode == 0
    assert start("killed", 17).returncode == -signal.SIGKILL
    second = start("killed", 35)
    assert second.returncode == -signal.SIGKILL and "toy: goes on after step 10 of 40" in second.stderr
    third = start("killed", -1)
    assert third.returncode == 0 and "toy: goes on after step 30 of 40" in third.stderr, third.stderr
    whole, killed = train(tmp_path / "whole"), train(tmp_path / "killed")
    assert_same(whole.params, killed.params)
    assert rows(tmp_path / "whole") == rows(tmp_path / "killed")
    assert whole.metrics == killed.metrics


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_the_same_call_goes_on(tmp_path, number):
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    stop = Source(40, act=lambda step: os.kill(os.getpid(), number) if step == 13 else None)
    with pytest.raises(Interrupted, match=r"toy: stopped at step \d+ of 40; the same command goes on from there"):
        train(tmp_path / "a", source=stop)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    assert_same(train(tmp_path / "a").params, train(tmp_path / "b").params)
    assert rows(tmp_path / "a") == rows(tmp_path / "b")


def test_a_second_ctrl_c_is_not_held_back():
    with stop_on_signal() as stop:
        assert not stop(0)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop(0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_best_evaluation_is_kept_and_patience_ends_the_run(tmp_path):
    seen = {}

    def evaluate(params):
        step = len(seen)
        seen[step] = jax.device_get(params)
        return {"recall": [0.1, 0.3, 0.3, 0.2, 0.9][step], "other": float(step)}

    options = dict(evaluate=evaluate, eval_every=4, keep="best", best_metric="recall", patience=2)
    done = train(tmp_path, **options)
    assert done.stopped == "patience" and done.steps == 16 and len(seen) == 4
    assert_same(done.params, seen[1])  # the earliest of equals
    assert done.metrics["recall"] == 0.3 and done.metrics["other"] == 1.0
    again = train(tmp_path, **options)  # evaluates nothing
    assert len(seen) == 4 and again.metrics == done.metrics and again.stopped == "patience"
    assert_same(again.params, seen[1])


def test_patience_is_counted_over_a_stop(tmp_path):
    values = iter([0.5, 0.4, 0.3, 0.2])
    options = dict(evaluate=lambda p: {"mrr": next(values)}, eval_every=4, keep="best", best_metric="mrr", patience=3)
    with pytest.raises(Interrupted):
        train(tmp_path, source=interrupted_source(), **options)
    done = train(tmp_path, **options)
    assert (done.stopped, done.steps, done.metrics["mrr"]) == ("patience", 16, 0.5)


def test_a_loss_that_is_not_finite_names_the_step(tmp_path):
    with pytest.raises(KgrecError, match="toy: found loss nan at step 13 of 40, expected a finite number; lower optim"):
        train(tmp_path, source=Source(40, bad_step=12))
    assert train(tmp_path, checkpoint_every=0).steps == 40  # the last good state is still there


@pytest.mark.parametrize("shape", [(1, 1), (2, 4)])
def test_the_mesh_does_not_change_the_result(tmp_path, shape):
    mesh = make_mesh(MeshConfig(*shape), jax.devices()[: shape[0] * shape[1]])
    one, other = train(tmp_path / "a", 10, mesh=mesh), train(tmp_path / "b", 10)
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params)):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=2e-5)


def test_another_mesh_on_resume_says_so(tmp_path, capsys):
    with pytest.raises(Interrupted):
        train(tmp_path, source=interrupted_source())
    done = train(tmp_path, mesh=make_mesh(MeshConfig(2, 4)), tracker=Tracker(tmp_path))
    assert done.steps == 40
    told = capsys.readouterr().err
    assert "goes on after step" in told and "data 8 × model 1" in told and "up to rounding, not bit for bit" in told


@pytest.mark.parametrize("change,words", [
    ({"steps": 50}, "num_steps 12, expected 50"), ({"seed": 2}, "seed 1, expected 2")])
def test_a_folder_of_another_run(tmp_path, change, words):
    train(tmp_path, 12)
    with pytest.raises(KgrecError, match=words):
        train(tmp_path, **({"steps": 12} | change))


def test_best_needs_a_metric(tmp_path):
    with pytest.raises(KgrecError, match="need evaluate and best_metric"):
        train(tmp_path, keep="best")
    with pytest.raises(KgrecError, match="found best_metric recall, expected one of mrr"):
        train(tmp_path, 4, keep="best", best_metric="recall", evaluate=lambda p: {"mrr": 1.0})


TWO_PROCESSES = """
import os, pathlib, sys
os.environ.update(XLA_FLAGS="--xla_force_host_platform_device_count=4", JAX_PLATFORMS="cpu")
import jax
jax.distributed.initialize(coordinator_address="127.0.0.1:" + sys.argv[2], num_processes=2, process_id=int(sys.argv[1]))
import test_train as t
from jax.experimental import multihost_utils
import numpy as np
done = t.train(pathlib.Path(sys.argv[3]), 20, keep="best", best_metric="x", eval_every=10,
               evaluate=lambda p: {"x": 1.0})
table = multihost_utils.process_allgather(done.params["table"], tiled=True)
if jax.process_index() == 0:
    np.save(sys.argv[3] + "/table.npy", table)
"""


def test_two_processes_train_what_one_trains(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tests = os.path.dirname(__file__)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([os.path.dirname(tests), tests])}
    (tmp_path / "two").mkdir()
    both = [subprocess.Popen([sys.executable, "-c", TWO_PROCESSES, str(i), str(port), str(tmp_path / "two")], env=env,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for i in range(2)]
    try:
        told = [process.communicate(timeout=240)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], told
    one = train(tmp_path / "one", 20, evaluate=lambda p: {"x": 1.0}, eval_every=10, keep="best", best_metric="x")
    # The earliest of equal evaluations is step 10: read back from a checkpoint that both processes wrote.
    np.testing.assert_allclose(np.load(tmp_path / "two" / "table.npy"), np.asarray(one.params["table"]), atol=1e-5)
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert a.keys() == b.keys() and all(a[k] == pytest.approx(b[k], rel=1e-5) for k in a)


def split_loss(params, constants, batch, key):
    """`loss` of a batch of any number of rows, with its (sum, count)."""
    q = params["query"][batch["query"]] * batch["scale"] + 0.01 * jax.random.normal(key, (len(batch["query"]), 8))
    losses = table_cross_entropy(q, params["table"], batch["target"], bias=constants["bias"])
    return losses.mean(), {"loss": (losses.sum(), jnp.float32(len(losses)))}


def test_parts_and_average_go_on_bit_for_bit(tmp_path):
    """Stopped between two checkpoints; the average is what is evaluated and returned."""
    def evaluate(params):
        return {"norm": float((params["table"] ** 2).sum())}

    options = dict(loss_fn=split_loss, accumulate=2, ema=0.9, evaluate=evaluate, eval_every=7, tell=True)
    whole = train(tmp_path / "whole", **options)
    with pytest.raises(Interrupted):
        train(tmp_path / "cut", source=interrupted_source(), **options)
    cut = train(tmp_path / "cut", **options)
    assert_same(whole.params, cut.params)
    assert rows(tmp_path / "whole") == rows(tmp_path / "cut") and whole.metrics == cut.metrics
    assert rows(tmp_path / "whole")[0].keys() == {"step", "norm"} and rows(tmp_path / "whole")[0]["step"] == 0
    held = load_part(tmp_path / "cut" / "checkpoints", {n: jax.eval_shape(init, jax.random.key(0))
                                                        for n in ("params", "average")})
    assert_same(held["average"], whole.params)
    assert not np.allclose(held["params"]["table"], held["average"]["table"])
    assert whole.metrics["norm"] == evaluate(whole.params)["norm"]
    assert_same(train(tmp_path / "cut", **options).params, whole.params)  # read, not trained


def test_a_run_that_ends_before_its_first_checkpoint_tells_the_beginning_once(tmp_path, capsys):
    def evaluate(params):
        return {"norm": 1.0}

    def fail(step):
        if step == 6:
            raise RuntimeError("lost")

    options = dict(evaluate=evaluate, eval_every=5, tell=True)
    with pytest.raises(RuntimeError, match="lost"):
        train(tmp_path, 10, source=Source(10, act=fail), **options)
    train(tmp_path, 10, tracker=Tracker(tmp_path), **options)
    assert [r["step"] for r in rows(tmp_path) if "norm" in r] == [0, 5, 10]
    assert "toy: step 0 of 10: norm 1\n" in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"accumulate": 0}, {"ema": 1.0}])
def test_bad_parts_and_decays(tmp_path, change):
    with pytest.raises(KgrecError, match="expected at least 1 part of a batch and a decay"):
        train(tmp_path, 4, **change)


def test_no_steps_at_all(tmp_path):
    done = train(tmp_path, 0)
    assert done.steps == 0 and done.stopped == "end"
    assert_same(train(tmp_path, 0).params, done.params)


def test_given_weights_enter_from_any_device_and_are_not_eaten(tmp_path):
    given = jax.device_put(np.ones((64, 8), np.float32), jax.devices()[3])
    options = dict(workdir=tmp_path, init_fn=lambda key: {"query": given, "table": np.ones((64, 8), np.float32)},
                   loss_fn=loss, constants={"bias": jax.device_put(jnp.zeros(64), jax.devices()[2])}, source=Source(3),
                   tx=optax.sgd(0.1), seed=0, mesh=make_mesh(MeshConfig()), rules=RULES, log_every=1,
                   checkpoint_every=0, label="toy", tracker=Tracker(tmp_path, quiet=True))
    done = fit(**options)
    assert (given == 1).all() and not (np.asarray(done.params["query"]) == 1).all()


def test_the_loader_starts_anywhere():
    source = Source(10)
    from_three = list(loader.iterate(source, 3))
    assert len(from_three) == 7
    assert_same(from_three[0], source[3])
    iterator = loader.iterate(source, 4)
    next(iterator)
    assert iterator.get_state()["next_index"] == 5  # batches made ahead do not count
