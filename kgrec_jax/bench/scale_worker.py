"""The process that `kgrec bench scale` measures: SETTINGS (JSON) and a scratch folder in, one line of JSON out."""

from __future__ import annotations

import contextlib
import json
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax

from kgrec_jax.config import Experiment
from kgrec_jax.data.folder import DataConfig
from kgrec_jax.errors import KgrecError
from kgrec_jax.evaluation.judge import Judge
from kgrec_jax.linear import neighbours
from kgrec_jax.linear.choose import LinearChoice
from kgrec_jax.linear.ease import skip_reason
from kgrec_jax.linear.ials import Settings, ials
from kgrec_jax.linear.popularity import popularity
from kgrec_jax.machine import cpu_threads, peak_mb
from kgrec_jax.models.recommender import TOWER, FusedModel, histories_of
from kgrec_jax.models.tower_config import TowerConfig
from kgrec_jax.stages import fuse, item_features
from kgrec_jax.stages.fuse_parts import Fitter, scale_of
from kgrec_jax.workdir import Run


class Phases:
    """Seconds, processor seconds and peak memory of each phase."""

    def __init__(self):
        self.found: dict[str, dict[str, Any]] = {}

    @contextlib.contextmanager
    def measure(self, name: str, what: str) -> Iterator[None]:
        """Measures what is done inside; where the system does not forget a peak, that is the highest so far."""
        with contextlib.suppress(OSError):
            pathlib.Path("/proc/self/clear_refs").write_text("5")
        began, cpu = time.monotonic(), time.process_time()
        yield
        self.found[name] = {"seconds": time.monotonic() - began, "cpu_s": time.process_time() - cpu,
                            "peak_mb": peak_mb(), "what": what}
        print(f"{name}: {self.found[name]['seconds']:.1f} s, peak {peak_mb() / 1024:.2f} GiB", file=sys.stderr,
              flush=True)


def work(settings: dict[str, Any], scratch: pathlib.Path) -> dict[str, Any]:
    """What `kgrec bench scale` reports of a log."""
    phases, seed = Phases(), settings["seed"]
    tower = TowerConfig(width=settings["dim"], candidates=settings["candidates"])
    experiment = Experiment(seed=seed, data=DataConfig(path=settings["data"]), fuse=fuse.Config(
        tower=tower, steps=settings["steps"], batch=settings["batch"], eval_users=settings["eval_users"],
        checkpoint_every=settings["steps"]))
    run = Run.open(scratch / "run", experiment, quiet=True)
    with phases.measure("read", "read, checked and hashed"):
        data = run.dataset
    with phases.measure("split", "cut and frozen to disk"):
        split = run.split
    shape, fit = (data.num_users, data.num_items), split.fit
    with phases.measure("ials", f"{settings['iterations']} iterations, {settings['dim']} factors"):
        matrix = fit.matrix(*shape)
        parts = {"popularity": popularity(matrix),
                 "collaborative": ials(matrix, Settings(settings["dim"], iterations=settings["iterations"]), seed=seed,
                                       keep=scratch / "ials.npz")}
    with phases.measure("tower", f"{settings['steps']} steps of {settings['batch']} users against "
                                 f"{settings['candidates']:,} drawn items"):
        content = item_features.build_content(data, run, None, "")
        linear = LinearChoice(100, 100, 500.0, 0.0, 500.0, 32, {})
        fitter = Fitter(tower, experiment.fuse.training, run, content, None, 0.0, linear, seed, without=("ease",))
        learned = fitter.tower(fit, scratch / "tower")
    with phases.measure("evaluate", "all items ranked for each user and model"):
        histories = histories_of(fit, *shape, tower.max_history)
        judge = Judge.of(run, histories, histories.matrix)
        model = FusedModel(parts, learned, {}, (*parts, TOWER), matrix.getnnz(axis=0), scale_of(matrix))
        ranked = {name: judge.of_part(part) for name, part in parts.items()} | {TOWER: judge.of_towers(model)}
    reason = skip_reason(data.num_items)
    found = phases.found.values()
    return {"users": data.num_users, "items": data.num_items, "interactions": len(data.interactions),
            "phases": phases.found, "seconds": sum(phase["seconds"] for phase in found),
            "peak_mb": max(phase["peak_mb"] for phase in found), "ranked": len(ranked[TOWER].users),
            "ndcg@10": {name: result.means()["ndcg@10"] for name, result in ranked.items()},
            "skipped": ({"ease": reason} if reason else {}) | neighbours.skip_reasons(matrix),
            "threads": cpu_threads(), "device": jax.devices()[0].device_kind}


def main() -> int:
    """Answers on the standard output; whatever else would be said there goes to the error output."""
    with contextlib.redirect_stdout(sys.stderr):
        try:
            answer = work(json.loads(sys.argv[1]), pathlib.Path(sys.argv[2]))
        except KgrecError as error:
            print(error, file=sys.stderr)
            return 1
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
