"""`kgrec domains`: several dataset folders in one run, each domain alone as its control."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from kgrec_jax.arguments import Parser, split_flags
from kgrec_jax.errors import KgrecError

HELP = """Several dataset folders in one run: towers, encoder and graph that all share, and heads of each domain.

  kgrec domains default --folders films books --workdir RUN
  kgrec domains default --folders films books music --workdir RUN --domains.heads.kind ple

CONFIG comes first; its fields are overridden as for kgrec run, and --domains.heads.… are the heads: shared (none),
mmoe (experts that all domains share, weighed by a gate of each) or ple (also experts of each domain's own). A folder's
name is its domain's. Entities and relations with equal ids are one row of the shared tables, items with equal
entity_id have the same neighbours; ids that are bare numbers, and entity_ids whose items have other names, stay apart.
--data.split.items is looked for in each folder.

Every domain is first trained alone (RUN/alone/NAME, an ordinary run), its towers for as many steps as the shared ones.
Then the shared towers are trained and join each domain's fused score as the part `domains`; RUN/joined/NAME is left for
kgrec recommend. As a control the shared towers and their heads are also trained on each domain alone (RUN/single/NAME),
which takes the training of towers and tables once more; --domains.control False leaves it out. RUN is left with
report.json and report.md: for each domain the shared towers beside these and beside its own ones, and the fused score
with each and without, among all, warm and cold items, with paired standard errors. The same command goes on where it
stopped."""


def domains(argv: Sequence[str]) -> int:
    """`kgrec domains CONFIG --folders A B --workdir RUN`: prints where the report is."""
    parser, (own, rest) = _parser(), split_flags(argv, ("--folders", "--workdir"))
    if not rest and ("-h" in own or "--help" in own) or list(argv[:1]) in (["-h"], ["--help"]):
        parser.print_help()
        return 0
    if not rest or rest[0].startswith("-"):
        raise KgrecError(f"CONFIG: found {rest[0] if rest else 'none'}, expected a config first: kgrec domains CONFIG "
                         "--folders A B --workdir RUN; see kgrec domains --help")
    args = parser.parse_args(own)
    from kgrec_jax.commands import overridden
    from kgrec_jax.config import load_config
    from kgrec_jax.stages.domains import DomainsExperiment, run

    experiment = overridden(DomainsExperiment.of(load_config(rest[0])), rest[1:], f"kgrec domains {rest[0]}",
                            "`kgrec domains --help` says more.")
    if experiment is None:
        return 0
    if not args.workdir:
        raise KgrecError("--workdir: found none, expected the folder of the run")
    folder = pathlib.Path(args.workdir).expanduser()
    run(experiment, args.folders, folder)
    print(f"{folder / 'report.md'}")
    return 0


def _parser() -> Parser:
    parser = Parser("domains", HELP)
    parser.add_argument("--folders", nargs="+", metavar="FOLDER", default=[], help="the dataset folders, two or more")
    parser.add_argument("--workdir", metavar="RUN", default="", help="the folder of the run: a new one, or one "
                                                                     "to go on with")
    return parser
