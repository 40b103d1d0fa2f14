"""`kgrec bench scale`: a log of a size of its own through reading, splitting, iALS, the towers and the ranking.

The log is generated once and kept in the cache; every measure is one of the program's own code path, in a process of
its own, so that its peak memory is that of nothing else. Training is cut to a fixed number of iterations and steps:
what it shows is that such a size can be trained on, in which time and memory, and not the best that it can give.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

from kgrec_jax.arguments import Parser, positive
from kgrec_jax.errors import KgrecError

WORKER = "kgrec_jax.bench.scale_worker"


def _parser() -> Parser:
    out = Parser("bench scale", f"""Measure how far a log may grow: seconds and peak memory of every phase.

  kgrec bench scale --users 100000 --items 20000 --interactions 5000000

{__doc__.partition(chr(10) * 2)[2]}""")
    out.add_argument("--users", type=positive, default=1_000_000, help="users of the log (default 1,000,000)")
    out.add_argument("--items", type=positive, default=200_000, help="items of the log (default 200,000)")
    out.add_argument("--interactions", type=positive, default=50_000_000, help="rows of it (default 50,000,000)")
    out.add_argument("--dim", type=positive, default=64, help="width of factors and towers (default 64)")
    out.add_argument("--iterations", type=positive, default=4, help="of iALS (default 4)")
    out.add_argument("--steps", type=positive, default=200, help="of the towers (default 200)")
    out.add_argument("--batch", type=positive, default=512, help="users of a step (default 512)")
    out.add_argument("--candidates", type=positive, default=2048, help="items drawn in a step (default 2048)")
    out.add_argument("--eval-users", type=positive, default=1_000, help="users that are ranked (default 1,000)")
    out.add_argument("--seed", type=int, default=0, help="of the log and of all training (default 0)")
    out.add_argument("--folder", default="", metavar="FOLDER",
                     help="where logs are kept, each in a folder of its own (default: bench in the cache)")
    out.add_argument("--json", action="store_true", help="one JSON object on the standard output")
    return out


def run(argv: list[str]) -> int:
    """Runs the benchmark; sizes that no log has and a process that fails are KgrecErrors."""
    args = _parser().parse_args(argv)
    if args.seed < 0:
        raise KgrecError(f"--seed: found {args.seed}, expected at least 0")
    folder, seconds = _log(args)
    asked = {name: getattr(args, name) for name in ("dim", "iterations", "steps", "batch", "candidates", "eval_users",
                                                    "seed")}
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".run-") as scratch:
        done = subprocess.run([sys.executable, "-m", WORKER, json.dumps({"data": str(folder), **asked}), scratch],
                              stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode != 0:
            why = "it was killed, as for memory" if done.returncode < 0 else f"exit code {done.returncode}"
            raise KgrecError(f"bench scale: found no result from its process ({why}), expected one; see above")
        found = json.loads(done.stdout.splitlines()[-1])
    result = {"format_version": 1, "data": str(folder), "generate_s": seconds, **asked, **found}
    print(json.dumps(result) if args.json else "\n".join(lines(result)))
    return 0


def _log(args: Any) -> tuple[pathlib.Path, float]:
    """(the dataset folder of the log, seconds that it took to generate; 0 where it was there)."""
    from kgrec_jax.bench.scale_log import write_log
    from kgrec_jax.data.sources import cache_root

    root = pathlib.Path(args.folder) if args.folder else cache_root() / "bench"
    folder = root / f"scale-{args.users}-{args.items}-{args.interactions}-{args.seed}"
    file, began = folder / "interactions.tsv", time.monotonic()
    if file.is_file():
        return folder, 0.0
    print(f"generating {args.interactions:,} interactions in {folder}", file=sys.stderr, flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_log(file, args.users, args.items, args.interactions, args.seed)
    return folder, time.monotonic() - began


def lines(result: dict[str, Any]) -> list[str]:
    """The result in words."""
    made = f"generated in {result['generate_s']:.0f} s" if result["generate_s"] else "generated before"
    out = [f"{result['users']:,} users, {result['items']:,} items, {result['interactions']:,} interactions ({made}): "
           f"{result['data']}", f"{result['threads']} threads, {result['device']}",
           f"{'phase':12s}{'seconds':>9s}{'processor s':>13s}{'peak GiB':>10s}"]
    for name, phase in result["phases"].items():
        out.append(f"{name:12s}{phase['seconds']:9.1f}{phase['cpu_s']:13.1f}{phase['peak_mb'] / 1024:10.2f}  "
                   f"{phase['what']}")
    out.append(f"{'together':12s}{result['seconds']:9.1f}{'':13s}{result['peak_mb'] / 1024:10.2f}")
    out.append(f"NDCG@10 of {result['ranked']:,} users: " + ", ".join(
        f"{name} {value:.4f}" for name, value in result["ndcg@10"].items()))
    out += [f"{name}: skipped: {why}" for name, why in result["skipped"].items()]
    return out
