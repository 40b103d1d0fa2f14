"""`kgrec run CONFIG --seeds N`: an experiment under several seeds, WORKDIR/seed-K each, and their figures together.

Data and split do not depend on the seed: they are read and cut once and handed on. Everything that is trained or chosen
by training is done for each seed anew, so that each seed's folder is what `kgrec run --seed K` would have left.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any

from kgrec_jax import pipeline
from kgrec_jax.commands import forget_programs
from kgrec_jax.config import Experiment
from kgrec_jax.data.dataset import Dataset, Split
from kgrec_jax.data.interactions import load_split, save_split
from kgrec_jax.errors import Interrupted, KgrecError
from kgrec_jax.evaluation.render import HEADLINE, metric_title
from kgrec_jax.evaluation.report import Report
from kgrec_jax.evaluation.seeds import PerUser, cell, markdown, paired_lines, summarise
from kgrec_jax.tracking import Tracker, write_json, write_text
from kgrec_jax.workdir import Run

PER_USER = pipeline.PER_USER


@dataclasses.dataclass(frozen=True)
class SeedRun(Run):
    """The run of a further seed, with data and split of the first one's."""

    first: Run

    @functools.cached_property
    def dataset(self) -> Dataset:
        """The first run's, which this run must have been begun with."""
        return self.with_counts_of(self.first.dataset)

    @functools.cached_property
    def split(self) -> Split:
        """The first run's, frozen to this folder too."""
        folder = self.path / "split"
        if not (folder / "split.json").is_file():
            save_split(self.first.split, self.dataset, folder)
            return self.first.split
        return load_split(folder, self.dataset)


def seed_folder(workdir: pathlib.Path, seed: int) -> pathlib.Path:
    """Where the run of a seed is."""
    return workdir / f"seed-{seed}"


def run(experiment: Experiment, workdir: pathlib.Path | str, count: int, quiet: bool = False) -> dict[str, Any]:
    """Runs `experiment` under `count` seeds from its own on; leaves seeds.md and seeds.json, whose content it returns.

    Seeds that are finished are read. Raises KgrecError for bad input (also: WORKDIR is a run itself, nothing is held
    out to measure on), naming the seed where one run failed; Interrupted after Ctrl-C once the state is saved.
    """
    if count < 1:
        raise KgrecError(f"--seeds: found {count}, expected at least 1")
    workdir = pathlib.Path(workdir)
    if (workdir / "experiment.json").is_file():
        raise KgrecError(f"{workdir}: found a run of one seed, expected a folder of seeds or a new name; choose another"
                         " --workdir")
    pipeline.check(experiment)
    seeds = [experiment.seed + k for k in range(count)]
    tracker = Tracker(workdir, quiet)
    reports: list[Report] = []
    first: Run | None = None
    for number, seed in enumerate(seeds, start=1):
        tracker.say(f"seed {seed} ({number} of {count}): {seed_folder(workdir, seed)}")
        held, report = _one(dataclasses.replace(experiment, seed=seed), seed_folder(workdir, seed), first, quiet)
        first = first or held
        reports.append(report)
    users = [PerUser.load(seed_folder(workdir, seed) / PER_USER) for seed in seeds]
    summary = summarise(seeds, reports, users)
    write_json(workdir / "seeds.json", summary)
    write_text(workdir / "seeds.md", markdown(summary))
    if not quiet:
        print_summary(summary)
    tracker.say(f"{count} seed{'s' if count > 1 else ''}: {workdir / 'seeds.md'}")
    return summary


def _one(experiment: Experiment, folder: pathlib.Path, first: Run | None, quiet: bool) -> tuple[Run, Report]:
    """The run of one seed and its report."""
    try:
        run = Run.open(folder, experiment, quiet)
        if first is not None:
            run = SeedRun(run.path, run.experiment, run.tracker, first)
        if not len(run.split.test):
            raise KgrecError("nothing is held out to measure on, expected a test part; set data.split.test_share "
                             "above 0")
        report = pipeline.go_on(run, quiet)
    except Interrupted:
        raise
    except KgrecError as error:
        raise KgrecError(f"seed {experiment.seed}: {error}") from None
    forget_programs()
    return run, report


def print_summary(summary: dict[str, Any]) -> None:
    """The headline figures on the terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    title = Text(f"{summary['name']}, seeds {', '.join(map(str, summary['seeds']))}: mean ± deviation [95 %, Student]")
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("model", no_wrap=True)
    for metric in HEADLINE:
        table.add_column(metric_title(metric), justify="right", no_wrap=True)
    for name, entry in summary["models"].items():
        table.add_row(name, *(Text(cell(entry.get(metric))) for metric in HEADLINE))
    console = Console()
    console.print(table)
    for line in paired_lines(summary):
        console.print(Text(line))
