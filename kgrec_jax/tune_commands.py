"""`kgrec tune`: hyper-parameters searched on the validation part."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from kgrec_jax.arguments import Parser, positive, split_flags
from kgrec_jax.errors import KgrecError

HELP = """Search the hyper-parameters of a config on the validation part of its data.

  kgrec tune default --data.path FOLDER --out TUNED --trials 30
  kgrec tune default --data.path FOLDER --out TUNED --space fuse.optim.peak_lr=1e-3..1e-1:log fuse.steps=300..900:300
  kgrec run TUNED/best.py --workdir RUN

CONFIG comes first; its fields are overridden as for kgrec run. A trial is trained on the training part alone and
measured on the validation part; the test part enters nothing, so a run with the best config can still be measured on
it. The first trial is CONFIG itself; then TPE proposes (Bergstra et al. 2011), and a trial among the worst quarter is
ended half-way. What no trial changes (pretrain, graph, texts) is computed once. Needs optuna:
pip install 'kgrec-jax[tune]'.

OUT is left with trials.tsv, best.json, best.py (a config), study.db, and a run folder a trial. The same command goes on
where it stopped; with more --trials it searches further."""


def tune(argv: Sequence[str]) -> int:
    """`kgrec tune CONFIG --out OUT`: prints where the best config is."""
    parser, (own, rest) = _parser(), split_flags(argv, ("--out", "--trials", "--metric", "--space"))
    if not rest and ("-h" in own or "--help" in own):
        parser.print_help()
        return 0
    if not rest or rest[0].startswith("-"):
        if any(word in ("-h", "--help") for word in argv):
            parser.print_help()
            return 0
        raise KgrecError(f"CONFIG: found {rest[0] if rest else 'none'}, expected a config first: kgrec tune CONFIG "
                         "--out OUT; see kgrec tune --help")
    args = parser.parse_args(own)
    from kgrec_jax.commands import overridden, say
    from kgrec_jax.config import load_config
    from kgrec_jax.tuning_space import SPACE, parse_space

    experiment = overridden(load_config(rest[0]), rest[1:], f"kgrec tune {rest[0]}", "`kgrec tune --help` says more.")
    if experiment is None:
        return 0
    if not args.out:
        raise KgrecError("--out: found none, expected the folder of the search")
    if not experiment.data.path:
        raise KgrecError("--data.path: found none, expected a dataset folder or a source; see kgrec data --help")
    space = parse_space(args.space) if args.space else SPACE
    from kgrec_jax.tuning import search
    from kgrec_jax.tuning_trial import Search

    out = pathlib.Path(args.out).expanduser()
    found = search(Search(experiment, space, args.metric), out, args.trials)
    print(f"{found['metric']} {found['value']:.4f} on the validation part by trial {found['trial']} "
          f"of {found['trials']}:")
    for path, value in found["params"].items():
        print(f"  --{path.replace('_', '-')} {value:.6g}" if isinstance(value, float)
              else f"  --{path.replace('_', '-')} {value}")
    say(f"kgrec run {out / 'best.py'} --workdir RUN trains and measures it")
    return 0


def _parser() -> Parser:
    parser = Parser("tune", HELP)
    parser.add_argument("--out", metavar="OUT", default="", help="the folder of the search: a new one, or one to go on "
                                                                 "with")
    parser.add_argument("--trials", type=positive, default=30, metavar="N", help="trials in all (default 30)")
    parser.add_argument("--metric", default="ndcg@10", metavar="NAME",
                        help="what is searched for: ndcg, recall, mrr, hit, precision or map, @10 or @20 "
                             "(default ndcg@10)")
    parser.add_argument("--space", nargs="+", default=[], metavar="PATH=RANGE",
                        help="fields and ranges in place of the usual ones: LOW..HIGH, LOW..HIGH:log, LOW..HIGH:STEP, "
                             "or VALUE,VALUE")
    return parser
