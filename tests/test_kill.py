"""A run that is killed with -9 once in each stage ends like one that nobody touched, bit for bit."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from tiny_encoder import make_tiny_encoder

from kgrec_jax.data.folder import write_folder
from kgrec_jax.data.toy import toy_world

CONFIG = """
from kgrec_jax.config import Experiment
from kgrec_jax.data.folder import DataConfig
from kgrec_jax.models.towers import TowerConfig
from kgrec_jax.stages import fuse, graph, pretrain
from kgrec_jax.stages.fuse_gate import GateConfig


def get_config():
    return Experiment(
        encoder={encoder!r}, data=DataConfig(path={data!r}),
        pretrain=pretrain.Config(head_steps=40, steps=40, batch=8, length=16, checkpoint_every=5, log_every=2),
        graph=graph.Config(dim=16, steps=300, batch=64, text_steps=40, text_batch=8, text_length=16,
                           checkpoint_every=20, log_every=5),
        fuse=fuse.Config(tower=TowerConfig(width=16, max_history=16), steps=120, batch=32, text_length=32,
                         checkpoint_every=20, log_every=5, gate=GateConfig(steps=60, batch=32)))
"""
# Where each kill falls: as soon as the training in this folder has logged something.
PLACES = ("pretrain/lora", "graph/structure", "graph/text", "fuse/tower_inner", "fuse/tower")


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """(command line but for the folder, environment)."""
    root = tmp_path_factory.mktemp("kill")
    world = toy_world()
    write_folder(world, root / "toy")
    encoder = make_tiny_encoder(root / "bert", [*world.item_texts, *world.graph.entity_names])
    config = root / "config.py"
    config.write_text(CONFIG.format(encoder=str(encoder), data=str(root / "toy")))
    env = {**os.environ, "XLA_FLAGS": "", "KGREC_CACHE": str(root / "cache"),
           "PYTHONPATH": str(pathlib.Path(__file__).resolve().parents[1])}
    return [sys.executable, "-m", "kgrec_jax", "run", str(config), "--workdir"], env


def finish(command, folder):
    """Runs to the end."""
    words, env = command
    done = subprocess.run([*words, str(folder)], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]


def kill_in(command, folder, place):
    """Starts the run and kills it once the training `place` has logged a row."""
    words, env = command
    rows = folder / place / "metrics.jsonl"
    running = subprocess.Popen([*words, str(folder)], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    limit = time.monotonic() + 300
    while running.poll() is None and time.monotonic() < limit and not (rows.is_file() and rows.stat().st_size):
        time.sleep(0.002)
    killed = running.poll() is None
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert rows.is_file(), f"the run never came to {place}"
    return killed and not (folder / place.split("/")[0] / "done.json").is_file()


def contents(folder):
    """{path: bytes} of what a run leaves for use, and its report without the times."""
    out = {str(p.relative_to(folder)): p.read_bytes() for p in sorted((folder / "recommender").rglob("*")) if p.is_file()}
    report = json.loads((folder / "report.json").read_text())
    report.pop("timing")
    return out, report


@pytest.mark.slow
def test_killed_in_each_stage_and_still_the_same(command, tmp_path):
    finish(command, tmp_path / "whole")
    killed = [place for place in PLACES if kill_in(command, tmp_path / "killed", place)]
    finish(command, tmp_path / "killed")
    assert len({place.split("/")[0] for place in killed}) == 3, f"only caught {killed}"
    files, report = contents(tmp_path / "whole")
    again, report_again = contents(tmp_path / "killed")
    assert report == report_again
    assert files.keys() == again.keys() and len(files) > 5
    assert [name for name in files if files[name] != again[name]] == []
    steps = [json.loads(row)["step"] for row in (tmp_path / "killed/graph/structure/metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))
