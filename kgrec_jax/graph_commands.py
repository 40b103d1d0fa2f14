"""`kgrec data inspect`, `kgrec data graph tables` and `kgrec data import tuples`: look at a graph, and add to it."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence

import numpy as np

from kgrec_jax.arguments import Parser, positive, share
from kgrec_jax.errors import KgrecError


def inspect(argv: Sequence[str]) -> int:
    """`kgrec data inspect FOLDER`: print the report, or with --out leave it as files too."""
    from kgrec_jax.data.graph_report import InspectConfig, inspect_graph
    from kgrec_jax.data.importers.auto import dataset_folder

    args = _inspect_parser().parse_args(argv)
    out = pathlib.Path(args.out).expanduser() if args.out else None
    if out is not None and out.exists() and not out.is_dir():
        raise KgrecError(f"--out: found the file {out}, expected a folder, or a name that is free")
    cfg = InspectConfig(args.min_share, tuple(args.type_relation or ()), tuple(args.languages))
    report, degree = inspect_graph(dataset_folder(args.folder), cfg)
    if out is not None:
        _write_report(report, degree, out)
    if args.json:
        print(json.dumps(dataclasses.asdict(report), ensure_ascii=False, indent=1))
    else:
        written = [f"written      {out}/report.json, relations.tsv, degrees.png"] if out else []
        print("\n".join([*report.render(), *written]))
    return 0


def _write_report(report, degree: np.ndarray, out: pathlib.Path) -> None:
    from kgrec_jax.data.graph_render import draw_degrees
    from kgrec_jax.data.tables import cell, write_tsv
    from kgrec_jax.tracking import write_json

    write_json(out / "report.json", dataclasses.asdict(report))
    columns = list(dict.fromkeys(key for row in report.relations for key in row))
    write_tsv(out / "relations.tsv", {c: [cell(row.get(c, "")) for row in report.relations] for c in columns})
    draw_degrees(degree, report.items["all"], out / "degrees.png")


def _inspect_parser() -> Parser:
    parser = Parser("data inspect", """Say what the graph of a dataset folder is like, and what looks wrong in it.

  kgrec data inspect FOLDER
  kgrec data inspect FOLDER --out REPORT          also report.json, relations.tsv and degrees.png

Relations with their functionality (distinct heads a triple), inverse functionality and symmetry, degrees, repeated
triples, relations that hold each other's pairs, entities of two types, triples whose ends are of an odd type, what has
no name or label, items in no triple, a test part that can be read off the training part, and the source of each
triple. FOLDER is not changed.""")
    parser.add_argument("folder", metavar="FOLDER", help="a dataset folder with a graph, or a source")
    parser.add_argument("--out", metavar="DIR", help="write the report and the degree picture there")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--min-share", type=share, default=0.8, metavar="X",
                        help="report two relations where one holds this share of the other's pairs (default 0.8)")
    parser.add_argument("--type-relation", nargs="+", metavar="NAME",
                        help="relations that state types (default: type, instance of, P31)")
    parser.add_argument("--languages", nargs="+", default=["en"], metavar="TAG", help="of names in RDF (default en)")
    return parser


def tables(argv: Sequence[str]) -> int:
    """`kgrec data graph tables`: print what was made of each column, leave the folder."""
    from kgrec_jax.data.importers.columns import ColumnConfig
    from kgrec_jax.data.importers.item_tables import TablesConfig, tables_to_graph

    args = _tables_parser().parse_args(argv)
    cfg = TablesConfig(pathlib.Path(args.items).expanduser(), tuple(args.columns or ()), args.item, args.only,
                       args.link, ColumnConfig(args.max_values, args.min_shared, args.buckets))
    print("\n".join(tables_to_graph(cfg, pathlib.Path(args.out).expanduser())))
    return 0


def _tables_parser() -> Parser:
    parser = Parser("data graph tables", """Turn the columns of an item table into relations of a graph.

  kgrec data graph tables --items films.csv --out data/films
  kgrec data graph tables --items data/mine --out data/more --columns year=buckets:1980,1990,2000 plot=skip

Says what became of each column, and takes it otherwise with --columns: category (a value a cell), list:SEPARATOR,
buckets:N (of about equal size), buckets:EDGE,EDGE… (where the second and later ones begin), skip. Free text, keys and
columns whose values hardly two items share are skipped. Of a dataset FOLDER everything is taken over and its graph
extended. Leaves OUT, complete or not at all; each triple carries its source FILE:COLUMN.""")
    parser.add_argument("--items", required=True, metavar="FILE",
                        help=".tsv, .csv or .parquet with a row an item, or a dataset folder")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="the new dataset folder")
    parser.add_argument("--columns", nargs="+", metavar="COLUMN=CHOICE", help="what is made of single columns")
    parser.add_argument("--only", action="store_true", help="leave out the columns that --columns does not name")
    parser.add_argument("--link", action="store_true", help="a value that one entity of FOLDER's graph is called by is "
                                                            "that entity")
    parser.add_argument("--item", default="", metavar="COLUMN", help="the item's id (default: item_id, id, …id)")
    parser.add_argument("--buckets", type=positive, default=5, metavar="N", help="of a numeric column (default 5)")
    parser.add_argument("--max-values", type=positive, default=10_000, metavar="N",
                        help="skip columns with more distinct values (default 10000)")
    parser.add_argument("--min-shared", type=share, default=0.2, metavar="X",
                        help="skip columns where fewer of the values are shared by several items (default 0.2)")
    return parser


def tuples(argv: Sequence[str]) -> int:
    """`kgrec data import tuples`: write the review file, or with it the extended folder."""
    from kgrec_jax.data.importers.review import TuplesConfig, import_tuples

    args = _tuples_parser().parse_args(argv)
    cfg = TuplesConfig(pathlib.Path(args.file).expanduser(), pathlib.Path(args.graph).expanduser(),
                       pathlib.Path(args.review).expanduser() if args.review else None, args.min_support,
                       args.min_confidence, args.auto_accept)
    print("\n".join(import_tuples(cfg, pathlib.Path(args.out).expanduser())))
    return 0


def _tuples_parser() -> Parser:
    parser = Parser("data import tuples", """Bring tuples that a program found in text into a graph, by way of a person.

  kgrec data import tuples found.tsv --graph data/mine --out data/more                    writes data/more.review.tsv
  kgrec data import tuples found.tsv --graph data/mine --out data/more --review data/more.review.tsv

FILE has subject, relation, object, confidence (0 to 1) and source, tab-separated or as JSON lines; the last two may be
missing. Forms that differ by case, articles, punctuation or inflection are one; ends are linked to entities by name and
alias. The review file has a row a statement: write accept or reject into its column decision, choose among ids where
names are shared, or set an entity to `new`. Only what is accepted comes into the graph, each triple with its source
and confidence.""")
    parser.add_argument("file", metavar="FILE", help=".tsv or .jsonl")
    parser.add_argument("--graph", required=True, metavar="FOLDER", help="the dataset folder whose graph is extended")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="the new dataset folder")
    parser.add_argument("--review", metavar="FILE", help="the review file of an earlier run, with decisions")
    parser.add_argument("--min-support", type=positive, default=1, metavar="N",
                        help="different sources of a statement (default 1)")
    parser.add_argument("--min-confidence", type=share, default=0.5, metavar="X",
                        help="confidence of a statement over its mentions (default 0.5)")
    parser.add_argument("--auto-accept", type=share, default=2.0, metavar="X",
                        help="accept statements this sure without a decision, if they have a known end and no shared "
                             "name (default: none)")
    return parser
