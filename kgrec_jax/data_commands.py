"""`kgrec data graph build` and `kgrec data import kgat`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from kgrec_jax.errors import KgrecError

HELP = """Make a graph for a dataset folder.

  kgrec data graph build --rdf FILE… --out FOLDER     RDF dumps of any size, whole or around the items
"""


def main(argv: Sequence[str]) -> int:
    """`kgrec data graph …` and `kgrec data import kgat …`; raises KgrecError for anything else."""
    if argv[:2] == ["import", "kgat"]:
        return import_kgat(_kgat_parser().parse_args(list(argv[2:])))
    if argv[1:2] == ["build"]:
        return build(_build_parser().parse_args(list(argv[2:])))
    if argv[1:] and argv[1] not in ("-h", "--help"):
        raise KgrecError(f"data graph: found {argv[1]!r}, expected build; see kgrec data graph --help")
    print(HELP, end="")
    return 0


def build(args: argparse.Namespace) -> int:
    """`kgrec data graph build`: the folder appears whole or not at all."""
    from kgrec_jax.data.graph_build import BuildConfig, build_graph
    from kgrec_jax.tracking import Tracker

    out = Path(args.out).expanduser()
    cfg = BuildConfig(
        rdf=tuple(Path(path).expanduser() for path in args.rdf or ()),
        items=Path(args.items).expanduser() if args.items else None, hops=args.hops,
        relations=tuple(args.relations or ()), languages=tuple(args.languages), store=args.store,
        endpoint=args.endpoint or "", processes=args.processes)
    print("\n".join(build_graph(cfg, out, Tracker(out))))
    return 0


def import_kgat(args: argparse.Namespace) -> int:
    """`kgrec data import kgat`: KGAT's files as a dataset folder with its fixed split."""
    from kgrec_jax.commands import say
    from kgrec_jax.data.importers import kgat
    from kgrec_jax.data.sources import resolve

    print("\n".join(kgat.import_kgat(resolve(args.source, say=say), Path(args.out).expanduser())))
    return 0


def _build_parser() -> argparse.ArgumentParser:
    from kgrec_jax.cli import _Parser, _positive

    parser = _Parser("data graph build", """Turn RDF into the graph of a dataset folder.

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
    parser.add_argument("--hops", type=_positive, default=2, metavar="N",
                        help="keep triples that touch an entity fewer than N steps from an item (default 2)")
    parser.add_argument("--relations", nargs="+", metavar="IRI", help="keep triples of these relations alone")
    parser.add_argument("--languages", nargs="+", default=["en"], metavar="TAG",
                        help="languages of names and texts, best first (default en)")
    parser.add_argument("--store", choices=("memory", "oxigraph"), default="memory",
                        help="oxigraph: also keep all of the files in an on-disk store for SPARQL")
    parser.add_argument("--processes", type=_positive, default=2, metavar="N",
                        help="parse pieces of N-Triples and several files at once (default 2)")
    return parser


def _kgat_parser() -> argparse.ArgumentParser:
    from kgrec_jax.cli import _Parser

    parser = _Parser("data import kgat", """Turn KGAT's files into a dataset folder with their fixed split.

  kgrec data import kgat Data/amazon-book data/amazon-book

Reads train.txt and test.txt (a user and its items a line), kg_final.txt (head relation tail), and where they are there
item_list.txt, entity_list.txt, relation_list.txt and user_list.txt. Leaves OUT, complete or not at all.""")
    parser.add_argument("source", metavar="SOURCE", help="a folder or a source (pypi:…, hub:…)")
    parser.add_argument("out", metavar="OUT", help="the new dataset folder")
    return parser
