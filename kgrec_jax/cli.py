"""One door: kgrec {run,recommend,data}."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys

from kgrec_jax.errors import Interrupted, KgrecError

_USAGE = """kgrec: a recommender that reads text, knows a graph and remembers behaviour

  kgrec run CONFIG --workdir RUN [--data.path FOLDER] [--FIELD VALUE ...]   all stages; goes on where it stopped
  kgrec recommend RUN (--user ID | --history TITLE ... | --all-users --out FILE) [-k 10] [--candidates FILE] [--json]
  kgrec data check FOLDER                                                 what is in a dataset folder
  kgrec data import {recbole,csv} SOURCE OUT [--split FOLDER]             other layouts into a dataset folder

CONFIG is a file with get_config(), or the name of a shipped one (default). `kgrec run CONFIG --help` lists every field.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs a command; bad input ends in one line and exit code 2, an interrupted run in 130."""
    argv = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    commands = {"run": _run, "recommend": _recommend, "data": _data}
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE)
        return 0
    try:
        if argv[0] not in commands:
            raise KgrecError(f"COMMAND: found {argv[0]!r}, expected one of {', '.join(commands)}; see kgrec --help")
        return commands[argv[0]](argv[1:])
    except Interrupted as stop:
        print(f"kgrec: {stop}", file=sys.stderr)
        return 130
    except KgrecError as error:
        print(f"kgrec: {error}", file=sys.stderr)
        return 2


def _run(argv: list[str]) -> int:
    import tyro

    from kgrec_jax.config import load_config
    from kgrec_jax.pipeline import run

    if not argv or argv[0].startswith("-"):
        raise KgrecError("CONFIG: found none, expected kgrec run CONFIG --workdir RUN")
    name, rest = argv[0], argv[1:]
    default = load_config(name)

    rest, workdir = _take(rest, "--workdir")
    try:
        experiment = tyro.cli(type(default), args=rest, default=default, prog=f"kgrec run {name}")
    except SystemExit as end:
        if end.code in (0, None):
            return 0
        raise KgrecError(f"arguments: found {' '.join(rest)}, expected fields of the config; see kgrec run {name} --help") from None
    if not workdir:
        raise KgrecError("--workdir: found none, expected the folder of the run")
    if not experiment.data.path:
        raise KgrecError("--data.path: found none, expected a dataset folder")
    run(experiment, pathlib.Path(workdir))
    return 0


def _take(argv: list[str], flag: str) -> tuple[list[str], str]:
    """The other arguments, and the value of a flag that is no field of the config."""
    rest, value = [], ""
    words = iter(argv)
    for word in words:
        if word == flag:
            value = next(words, "")
        elif word.startswith(flag + "="):
            value = word[len(flag) + 1:]
        else:
            rest.append(word)
    return rest, value


def _parser(name: str) -> argparse.ArgumentParser:
    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> None:
            raise KgrecError(f"arguments: {message}; see {self.prog} --help")

    return Parser(prog=f"kgrec {name}")


def _recommend(argv: list[str]) -> int:
    parser = _parser("recommend")
    parser.add_argument("run")
    parser.add_argument("--user", help="a user id of the log")
    parser.add_argument("--history", nargs="+", metavar="TITLE", help="titles of items")
    parser.add_argument("--all-users", action="store_true", help="every user, to --out")
    parser.add_argument("--out", help="where --all-users writes user_id item_id rank score")
    parser.add_argument("--candidates", help="a file with one item id a line: rank only these")
    parser.add_argument("-k", type=int, default=10, help="length of a list")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    from kgrec_jax.serving.recommender import Recommender

    held = Recommender.load(args.run)
    candidates = pathlib.Path(args.candidates).read_text(encoding="utf-8").split("\n") if args.candidates else None
    candidates = [c.rstrip("\r") for c in candidates if c.strip()] if candidates is not None else None
    if args.all_users:
        if not args.out:
            raise KgrecError("--out: found none, expected the file that --all-users writes")
        items, scores = held.all_users(args.k, candidates)
        with open(args.out, "w", encoding="utf-8") as file:
            file.write("user_id\titem_id\trank\tscore\n")
            for user, row, values in zip(held.user_ids, items, scores):
                for rank, (item, score) in enumerate(zip(row, values), start=1):
                    if item >= 0:
                        file.write(f"{user}\t{held.item_ids[item]}\t{rank}\t{score:.6g}\n")
        return 0
    found = held.recommend(user=args.user, history=args.history, k=args.k, candidates=candidates)
    if held.held_out and not args.json:
        print(f"note: {held.held_out:,} interactions were held out to measure; their items may appear", file=sys.stderr)
    if args.json:
        print(json.dumps(found, ensure_ascii=False, indent=1))
    else:
        for rank, row in enumerate(found, start=1):
            print(f"{rank:3d}  {row['title']}  ({row['score']:.2f})\n     {row['reason']}")
    return 0


def _data(argv: list[str]) -> int:
    if argv[:1] == ["check"]:
        parser = _parser("data check")
        parser.add_argument("folder")
        from kgrec_jax.data.check import check_folder

        print("\n".join(check_folder(parser.parse_args(argv[1:]).folder).render()))
        return 0
    if argv[:1] == ["import"]:
        parser = _parser("data import")
        parser.add_argument("kind", choices=("recbole", "csv"))
        parser.add_argument("source")
        parser.add_argument("out")
        parser.add_argument("--split", help="a folder with train.tsv, test.tsv and perhaps valid.tsv")
        parser.add_argument("--links", choices=("auto", "keep", "drop"), default="auto",
                            help="recbole: join items to the .link file's entities; auto: unless it contradicts the items")
        args = parser.parse_args(argv[1:])
        from kgrec_jax.data.importers.csv import import_csv
        from kgrec_jax.data.importers.recbole import import_recbole
        from kgrec_jax.data.sources import resolve

        source, split = resolve(args.source), pathlib.Path(args.split) if args.split else None
        out = pathlib.Path(args.out)
        notes = import_recbole(source, out, split, args.links) if args.kind == "recbole" else import_csv(source, out, split)
        print("\n".join(notes))
        return 0
    raise KgrecError("data: expected kgrec data check FOLDER or kgrec data import {recbole,csv} SOURCE OUT")
