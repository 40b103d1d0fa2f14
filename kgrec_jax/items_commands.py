"""`kgrec items add|remove`: new items join a finished run, and leave it again, without training."""

from __future__ import annotations

import argparse
import pathlib
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kgrec_jax.arguments import Parser
from kgrec_jax.errors import KgrecError

if TYPE_CHECKING:
    from kgrec_jax.serving.recommender import Recommender

HELP = """New items in a finished run, without training.

  kgrec items add RUN FOLDER [--out OUT]    the items of FOLDER join the recommender of RUN
  kgrec items remove RUN ID… [--out OUT]    items that were added leave it again
"""


def main(argv: Sequence[str]) -> int:
    """`kgrec items …`; raises KgrecError for anything else than a known command with its arguments."""
    if argv and argv[0] == "add":
        return add(_add_parser().parse_args(list(argv[1:])))
    if argv and argv[0] == "remove":
        return remove(_remove_parser().parse_args(list(argv[1:])))
    if argv and argv[0] not in ("-h", "--help"):
        raise KgrecError(f"items: found {argv[0]!r}, expected add or remove; see kgrec items --help")
    print(HELP, end="")
    return 0


def add(args: argparse.Namespace) -> int:
    """`kgrec items add`: the recommender with the new items is there whole, or the one before is."""
    from kgrec_jax.commands import say
    from kgrec_jax.data.folder import DataConfig
    from kgrec_jax.data.new_items import read_new_items
    from kgrec_jax.serving.additions import add_items
    from kgrec_jax.serving.intake import JOURNAL
    from kgrec_jax.serving.recommender import Recommender

    began = time.monotonic()
    folder = _target(args.run, args.out)
    held = Recommender.load(args.run)
    intake = held.intake
    cfg = DataConfig() if intake is None else DataConfig(text_columns=intake.text_columns, languages=intake.languages)
    new = read_new_items(args.folder, cfg)
    grown = add_items(held, new, str(pathlib.Path(args.folder).resolve()), say)
    _save(grown, folder)
    say(f"{len(grown.item_ids):,} items in {folder} after {time.monotonic() - began:.1f} s; {folder.parent / JOURNAL} "
        f"lists the added ones: kgrec recommend {args.out or args.run} --user ID")
    return 0


def remove(args: argparse.Namespace) -> int:
    """`kgrec items remove`: undoes what `kgrec items add` did, item by item."""
    from kgrec_jax.commands import say
    from kgrec_jax.serving.additions import remove_items
    from kgrec_jax.serving.recommender import Recommender

    folder = _target(args.run, args.out)
    left = remove_items(Recommender.load(args.run), args.ids)
    _save(left, folder)
    say(f"{len(left.item_ids):,} items left in {folder}, of these {len(left.added):,} added ones")
    return 0


def _target(run: str, out: str | None) -> pathlib.Path:
    """The folder that the recommender is written to; KgrecError where --out is in use."""
    from kgrec_jax.serving.recommender import Recommender

    if out is None:
        return Recommender.folder(run)
    target = pathlib.Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise KgrecError(f"--out: found something at {out} already, expected a new or empty folder; choose another")
    return target / "recommender"


def _save(held: Recommender, folder: pathlib.Path) -> None:
    """Writes the recommender, then its journal, which says again what the recommender itself holds."""
    from kgrec_jax.data.tables import write_tsv
    from kgrec_jax.serving.intake import JOURNAL

    folder.parent.mkdir(parents=True, exist_ok=True)
    held.save(folder)
    journal = folder.parent / JOURNAL
    if not held.added:
        journal.unlink(missing_ok=True)
        return
    write_tsv(journal, {"item_id": [a.item_id for a in held.added], "title": [a.title for a in held.added],
                        "links": [str(a.links) for a in held.added],
                        "known_to": [" ".join(a.parts) for a in held.added], "source": [a.source for a in held.added]})


def _add_parser() -> argparse.ArgumentParser:
    parser = Parser("items add", """Add new items to a finished run at once; nothing is trained.

  kgrec items add runs/quickstart new-films
  kgrec items add runs/quickstart new-films/items.tsv --out runs/with-new-films

FOLDER is a dataset folder (see kgrec data --help) with the new items alone: items.tsv, and where there are any
triples.tsv (or graph.ttl) that links them to entities of the run's graph by id, media/NAME.npy, and raw files in
media/NAME/ where the run has learned from such. Nobody has touched them yet, so they are recommended and explained
like any cold item, and found by --query and as a --history. Idf, means and scales stay those of the run; triples with
an entity or relation that the run does not know are counted and left out. Users' interactions with the new items are
learned from by a new run alone.

The recommender of RUN is replaced once the new one is complete (--out: it stays, and OUT gets the new one), and
added.tsv beside it says what was added from where. kgrec evaluate RUN writes the recommender without the additions.""")
    parser.add_argument("run", metavar="RUN", help="the folder of a finished or refitted run")
    parser.add_argument("folder", metavar="FOLDER", help="a dataset folder, or an item table alone")
    parser.add_argument("--out", metavar="OUT", help="a new folder for the grown recommender")
    return parser


def _remove_parser() -> argparse.ArgumentParser:
    parser = Parser("items remove", """Take items that kgrec items add has added out again.

  kgrec items remove runs/quickstart film17 film18

RUN's recommender is replaced once the new one is complete (--out: it stays), and added.tsv with it.""")
    parser.add_argument("run", metavar="RUN", help="the folder of a run that items were added to")
    parser.add_argument("ids", metavar="ID", nargs="+", help="item ids of added.tsv")
    parser.add_argument("--out", metavar="OUT", help="a new folder for the recommender without them")
    return parser
