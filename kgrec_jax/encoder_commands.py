"""`kgrec encoder export`: the encoder of a run for others to use."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from kgrec_jax.arguments import Parser
from kgrec_jax.errors import KgrecError

HELP = """Use a run's encoder elsewhere.

  kgrec encoder export RUN OUT [--stage STAGE]    a Hugging Face folder that transformers loads
"""


def main(argv: Sequence[str]) -> int:
    """`kgrec encoder …`; raises KgrecError for anything else than a known command with its arguments."""
    if argv and argv[0] == "export":
        return export(_export_parser().parse_args(list(argv[1:])))
    if argv and argv[0] not in ("-h", "--help"):
        raise KgrecError(f"encoder: found {argv[0]!r}, expected export; see kgrec encoder --help")
    print(HELP, end="")
    return 0


def export(args: argparse.Namespace) -> int:
    """`kgrec encoder export`: OUT appears whole or not at all."""
    from kgrec_jax.commands import say
    from kgrec_jax.pretrained.export import describe, export_run

    encoder = export_run(args.run, args.out, args.stage, say=say)
    say(f"{args.out}: {describe(encoder)}, with its tokenizer; AutoModel.from_pretrained loads it")
    return 0


def _export_parser() -> argparse.ArgumentParser:
    parser = Parser("encoder export", """Write the encoder of a run as a Hugging Face folder.

  kgrec encoder export runs/quickstart my-encoder
  kgrec encoder export runs/quickstart my-encoder --stage pretrain

Leaves OUT with config.json, model.safetensors and the tokenizer's files, complete or not at all; an existing OUT is
not overwritten. transformers loads it with equal outputs (AutoModel; AutoModelForMaskedLM where a stage has trained
the head), and so does --encoder OUT here. There is no pooler in it.""")
    parser.add_argument("run", metavar="RUN", help="the folder of a run")
    parser.add_argument("out", metavar="OUT", help="the new folder")
    parser.add_argument("--stage", choices=("graph", "pretrain", "released"), default="",
                        help="whose encoder; default: the latest stage that left one (released: as the run began)")
    return parser
