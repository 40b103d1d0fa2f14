"""`kgrec data …`: look into a dataset folder, make one of another layout, make a graph of RDF."""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Sequence
from typing import Any

from kgrec_jax.arguments import Parser, positive
from kgrec_jax.commands import say
from kgrec_jax.errors import KgrecError

HELP = """Look into data, or make a dataset folder of it.

  kgrec data check FOLDER                         counts, gaps, languages and minutes, in seconds and before training
  kgrec data inspect FOLDER                       its graph: relations, degrees, duplicates, types, sources
  kgrec data import {recbole,csv,kgat} SOURCE OUT other layouts into the project's dataset folder
  kgrec data import tuples FILE …                 tuples found in text into a graph, once a person has reviewed them
  kgrec data graph build --rdf FILE… --out FOLDER RDF of any size into the graph of a dataset folder
  kgrec data graph tables --items FILE --out FOLDER columns of an item table as relations
  kgrec data rules FOLDER                         Horn rules of its graph, with their confidence
"""
GRAPH_HELP = """Make a graph for a dataset folder.

  kgrec data graph build --rdf FILE… --out FOLDER     RDF dumps of any size, whole or around the items
  kgrec data graph tables --items FILE --out FOLDER   columns of an item table as relations
"""


def main(argv: Sequence[str]) -> int:
    """`kgrec data …`; raises KgrecError for anything else than a known command with its arguments."""
    name, rest = (argv[0] if argv else "--help"), list(argv[1:])
    if name == "check":
        return check(_check_parser().parse_args(rest))
    if name == "import" and rest[:1] == ["tuples"]:
        from kgrec_jax.graph_commands import tuples

        return tuples(rest[1:])
    if name == "import":
        return import_(_import_parser().parse_args(rest))
    if name == "graph":
        return _graph(rest)
    if name == "inspect":
        from kgrec_jax.graph_commands import inspect

        return inspect(rest)
    if name == "rules":
        from kgrec_jax.rules_commands import rules

        return rules(rest)
    if name not in ("-h", "--help"):
        raise KgrecError(f"data: found {name!r}, expected check or import or graph or inspect or rules; see kgrec data "
                         "--help")
    print(HELP, end="")
    return 0


def _graph(argv: list[str]) -> int:
    if argv[:1] == ["build"]:
        return build(_build_parser().parse_args(argv[1:]))
    if argv[:1] == ["tables"]:
        from kgrec_jax.graph_commands import tables

        return tables(argv[1:])
    if argv and argv[0] not in ("-h", "--help"):
        raise KgrecError(f"data graph: found {argv[0]!r}, expected build or tables; see kgrec data graph --help")
    print(GRAPH_HELP, end="")
    return 0


def check(args: argparse.Namespace) -> int:
    """`kgrec data check`: what is in a folder, and how long the stages would take on it."""
    from kgrec_jax import budget
    from kgrec_jax.config import ENCODER, Experiment
    from kgrec_jax.data.check import check_folder
    from kgrec_jax.data.sources import resolve
    from kgrec_jax.data.text import load_tokenizer

    experiment = Experiment(encoder=args.encoder or ENCODER)
    folder, missing = None, ""
    if args.encoder:
        folder = resolve(args.encoder, say=say)
    elif not args.no_encoder:
        try:
            folder = resolve(ENCODER, say=say)
        except KgrecError as error:
            missing = f"the texts were not measured, the encoder is not here: {error}"
    tokenizer = load_tokenizer(folder) if folder else None

    def seconds(dataset: Any) -> dict[str, float]:
        return {name: b.seconds for name, b in budget.stage_budgets(experiment, dataset, tokenizer).items()}

    report = check_folder(args.folder, tokenizer=folder, budgets=seconds, say=say)
    print("\n".join([*report.render(), *([f"note          {missing}"] if missing else [])]))
    return 0


def import_(args: argparse.Namespace) -> int:
    """`kgrec data import`: another layout as a dataset folder."""
    from kgrec_jax.data.importers.csv import import_csv
    from kgrec_jax.data.importers.kgat import import_kgat
    from kgrec_jax.data.importers.recbole import import_recbole
    from kgrec_jax.data.sources import resolve

    split, out = pathlib.Path(args.split).expanduser() if args.split else None, pathlib.Path(args.out).expanduser()
    if split is not None and args.kind == "kgat":
        raise KgrecError(f"--split: found {args.split} for kgat, whose files are a split, expected it with recbole or "
                         "csv")
    if split is not None and not split.is_dir():
        raise KgrecError(f"--split: found no folder {args.split}, expected one with train.tsv and test.tsv")
    if args.links != "auto" and args.kind != "recbole":
        raise KgrecError(f"--links: found {args.links} for {args.kind}, expected it with recbole alone")
    source = resolve(args.source, say=say)
    if args.kind == "recbole":
        notes = import_recbole(source, out, split, args.links)
    else:
        notes = import_csv(source, out, split) if args.kind == "csv" else import_kgat(source, out)
    print("\n".join(notes))
    return 0


def build(args: argparse.Namespace) -> int:
    """`kgrec data graph build`: the folder appears whole or not at all."""
    from kgrec_jax.data.graph_build import BuildConfig, build_graph
    from kgrec_jax.tracking import Tracker

    out = pathlib.Path(args.out).expanduser()
    cfg = BuildConfig(
        rdf=tuple(pathlib.Path(path).expanduser() for path in args.rdf or ()),
        items=pathlib.Path(args.items).expanduser() if args.items else None, hops=args.hops,
        relations=tuple(args.relations or ()), languages=tuple(args.languages), store=args.store,
        endpoint=args.endpoint or "", numbers=args.numbers,
        processes=args.processes)
    print("\n".join(build_graph(cfg, out, Tracker(out))))
    return 0


def _check_parser() -> argparse.ArgumentParser:
    parser = Parser("data check", """Say what is in a dataset folder, and how long a run on it would take.

  kgrec data check FOLDER
  kgrec data check 'pypi:recbole==1.2.1#recbole/dataset_example/ml-100k'

Reads everything as a run would, with the same errors. Nothing is trained and FOLDER is not changed; RecBole's atomic
files are imported into the cache, as a run would import them.""")
    parser.add_argument("folder", metavar="FOLDER", help="a dataset folder, a folder with *.inter, or a source")
    encoder = parser.add_mutually_exclusive_group()
    encoder.add_argument("--encoder", metavar="SOURCE", help="whose tokenizer is measured on the texts (a folder, "
                                                             "pypi:…, hub:…); default: the shipped configs' encoder")
    encoder.add_argument("--no-encoder", action="store_true", help="measure no tokenizer, fetch nothing")
    return parser


def _import_parser() -> argparse.ArgumentParser:
    parser = Parser("data import", """Turn another layout into a dataset folder.

  kgrec data import recbole 'pypi:recbole==1.2.1#recbole/dataset_example/ml-100k' data/ml-100k
  kgrec data import csv ratings/ data/mine --split ratings/split
  kgrec data import kgat Data/amazon-book data/amazon-book
  kgrec data import tuples FILE …                 see kgrec data import tuples --help

recbole reads the atomic files NAME.inter .item .user .kg .link, csv finds the log, the items and the triples among
tables with headers. kgat reads train.txt and test.txt (a user and its items a line), kg_final.txt (head relation tail),
and where they are there item_list.txt, entity_list.txt, relation_list.txt and user_list.txt. Leaves OUT, complete or
not at all; an existing folder is not overwritten.""")
    parser.add_argument("kind", choices=("recbole", "csv", "kgat"))
    parser.add_argument("source", metavar="SOURCE", help="a folder or a source (pypi:…, hub:…)")
    parser.add_argument("out", metavar="OUT", help="the new dataset folder")
    parser.add_argument("--split", metavar="FOLDER", help="a folder with train.tsv, test.tsv and perhaps valid.tsv")
    parser.add_argument("--links", choices=("auto", "keep", "drop"), default="auto",
                        help="recbole: join items to the .link file's entities; auto: unless it contradicts the items")
    return parser


def _build_parser() -> argparse.ArgumentParser:
    parser = Parser("data graph build", """Turn RDF into the graph of a dataset folder.

  kgrec data graph build --rdf dump.nt.gz labels.ttl --out graph
  kgrec data graph build --rdf dump.nt --items data/mine --hops 2 --out graph --languages en zh
  kgrec data graph build --endpoint https://dbpedia.org/sparql --items iris.txt --hops 1 --out graph

Files may be larger than memory; disk must hold about twice their content. Without --items everything is converted.
Leaves FOLDER with triples.tsv, entities.tsv and relations.tsv (and store/), complete or not at all.""")
    parser.add_argument("--rdf", nargs="+", metavar="FILE", help=".nt .nq .ttl .trig .rdf, also .gz and .bz2")
    parser.add_argument("--endpoint", metavar="URL", help="ask a SPARQL endpoint instead; needs --items")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="the new folder")
    parser.add_argument("--items", metavar="FILE", help="IRIs of the items, one a line, or a dataset folder with the "
                                                        "column entity_id: only their neighbourhood is kept")
    parser.add_argument("--hops", type=positive, default=2, metavar="N",
                        help="keep triples that touch an entity fewer than N steps from an item (default 2)")
    parser.add_argument("--relations", nargs="+", metavar="IRI", help="keep triples of these relations alone")
    parser.add_argument("--languages", nargs="+", default=["en"], metavar="TAG",
                        help="languages of names and texts, best first (default en)")
    parser.add_argument("--numbers", type=positive, default=0, metavar="N",
                        help="also put the numbers and dates of each relation into N buckets, as entities (default: "
                             "text alone)")
    parser.add_argument("--store", choices=("memory", "oxigraph"), default="memory",
                        help="oxigraph: also keep all of the files in an on-disk store for SPARQL")
    parser.add_argument("--processes", type=positive, default=2, metavar="N",
                        help="parse pieces of N-Triples and several files at once (default 2)")
    return parser
