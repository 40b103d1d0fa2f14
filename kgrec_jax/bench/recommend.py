"""`kgrec bench recommend`: graph recommenders and full ranking beside RecBole, on the same data and the same graph.

Training: RecBole trains a model by its defaults until it stops by itself; this program trains the same kind until its
NDCG@10 on the validation part is RecBole's best. Both rank all items, those of training left out, and RecBole's scores
are ranked here once more, which must give RecBole's own figure. What counts are processor seconds, on one thread each,
to RecBole's best epoch and to the moment of reaching it: with compilation, and both with and without the rankings.
The same kind is not the same recipe: RecBole's learns a row for each user by BPR with a drawn rival and walks a triple
one way; this program's makes users of their histories, learns against all items and walks triples both ways.

Ranking: the same vectors rank all items for every test user by both programs: seconds, memory, figures.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from kgrec_jax.arguments import Parser, positive
from kgrec_jax.bench import recommend_world
from kgrec_jax.errors import KgrecError

MODELS = ("kgin", "kgat", "lightgcn")
SIZES = (5_000, 20_000)  # generated users, and as many items
NEVER = 2.0  # more than an NDCG can be
SAME = 5e-5  # figures that differ by less are one to four decimals
_SINGLE = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def _parser() -> Parser:
    out = Parser("bench recommend", f"""Measure graph recommenders and full ranking beside RecBole.

  kgrec bench recommend --data FOLDER --peer-python recbole-env/bin/python
  kgrec bench recommend --data FOLDER --models lightgcn --parts train

{__doc__.partition(chr(10) * 2)[2]}""")
    out.add_argument("--data", default="", metavar="FOLDER",
                     help="a dataset folder with train.tsv, valid.tsv, test.tsv and a graph; without it generated data "
                          "alone is ranked")
    out.add_argument("--peer-python", default="", metavar="PATH",
                     help="an interpreter with torch and recbole: the peer runs too")
    out.add_argument("--parts", nargs="+", choices=("train", "rank"), default=["train", "rank"],
                     help="what is measured (default: both)")
    out.add_argument("--models", nargs="+", choices=MODELS, default=["kgin", "kgat"],
                     help="what is trained (default kgin kgat)")
    out.add_argument("--epochs", type=positive, default=0, help="most epochs of the peer (default RecBole's, 300)")
    out.add_argument("--peer-cpu", type=positive, default=0, metavar="SECONDS",
                     help="processor seconds after which the peer's training ends (default: none)")
    out.add_argument("--steps", type=positive, default=0, help="steps of this program (default: as kgrec run)")
    out.add_argument("--every", type=positive, default=20, help="steps between two rankings (default 20)")
    out.add_argument("--target", type=float, default=0.0,
                     help="the NDCG@10 to reach where no peer sets it (default: only the end counts)")
    out.add_argument("--sizes", nargs="*", type=positive, default=list(SIZES),
                     help=f"generated users, and as many items, that are ranked (default {SIZES[0]} {SIZES[1]})")
    out.add_argument("--peer-batch", type=positive, default=0,
                     help="scores of one batch of the peer's ranking, eval_batch_size (default RecBole's, 4096)")
    out.add_argument("--seed", type=int, default=0, help="of this program's training (default 0)")
    out.add_argument("--json", action="store_true", help="one JSON object on the standard output")
    return out


def run(argv: list[str]) -> int:
    """Runs the benchmark; bad options, data without a split and a peer that cannot run are KgrecErrors."""
    args = _parser().parse_args(argv)
    if "train" in args.parts and not args.data and "rank" not in args.parts:
        raise KgrecError("--data: found none, expected a dataset folder to train on")
    if args.peer_python:
        _check_peer(args.peer_python)
    out: dict[str, Any] = {"format_version": 1, "threads": 1, "training": {}, "ranking": []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        if args.data:
            data = _read(args.data)
            if "train" in args.parts:
                linked = any(name != "lightgcn" for name in args.models)
                arrays, left = recommend_world.arrays_of(data, linked)
                out |= {"data": data.name, "users": int(arrays["num_users"]), "items": int(arrays["num_items"]),
                        "interactions": {name: len(arrays[name]) for name in recommend_world.PARTS},
                        "triples": len(arrays.get("triples", ())), "left_out": left}
                np.savez(folder / "world.npz", **arrays)
                out["training"] = {name: _train(args, name, folder, out) for name in args.models}
        if "rank" in args.parts:
            if args.data:
                arrays, _ = recommend_world.arrays_of(data, False)
                arrays |= recommend_world.factors_of(arrays)
                out["ranking"].append(_rank(args, data.name, arrays, folder, out))
            for size in args.sizes:
                out["ranking"].append(_rank(args, "generated", recommend_world.generated(size, size), folder, out))
    print(json.dumps(out) if args.json else "\n".join(lines(out)))
    return 0


def lines(result: dict[str, Any]) -> list[str]:
    """The result in words."""
    out = [f"one thread each, processor seconds; {result['program']}"
           + (f" beside {result['peer_program']}" if "peer_program" in result else "")]
    if result["training"]:
        count = result["interactions"]
        out.append(f"{result['data']}: {result['users']:,} users, {result['items']:,} items, {count['train']:,} / "
                   f"{count['valid']:,} / {count['test']:,} interactions, {result['triples']:,} triples; "
                   f"{result['left_out']:,} interactions with items outside the graph left out on both sides")
    for name, found in result["training"].items():
        out += _training_lines(name, found)
    if result["ranking"]:
        heads = ("CPU s", "seconds", "peak MB", "growth", "NDCG@10")
        out.append(f"{'full ranking':44s}" + "".join(f"{head:>9s}" for head in heads))
    for row in result["ranking"]:
        out += _ranking_lines(row)
    return out


def _training_lines(name: str, found: dict[str, Any]) -> list[str]:
    ours, peer, reached = found["ours"], found.get("peer"), found["ours"]["reached"]
    out = []
    if peer:
        best = peer["best"]
        out.append(f"{name}: peer: best NDCG@10 valid {best['ndcg@10']:.4f}, test {peer['test']:.4f} at epoch "
                   f"{best['epoch']} of {len(peer['curve'])} (ended by {peer['stopped']}): {best['cpu_s']:.1f} s, "
                   f"{best['train_cpu_s']:.1f} s without validation; {peer['peak_mb']:.0f} MB")
        out.append(f"{name}: peer's scores ranked here: {found['judged']:.6f}, by RecBole {peer['valid']:.6f}: "
                   + ("the same to four decimals" if abs(found["judged"] - peer["valid"]) < SAME else "NOT the same"))
    if found["target"]:
        out.append(f"{name}: kgrec: " + (
            f"reached {reached['ndcg@10']:.4f} (test {reached['test']:.4f}) at step {reached['step']} of "
            f"{ours['steps']}: {reached['cpu_s']:.1f} s, {reached['train_cpu_s']:.1f} s without validation, "
            f"{ours['compile_cpu_s']:.1f} s of them before the first step" if reached else
            f"did not reach {found['target']:.4f}"))
    last, best = ours["curve"][-1], ours["best"]
    out.append(f"{name}: kgrec: best NDCG@10 valid {best['ndcg@10']:.4f} at step {best['step']}; at the end "
               f"{last['ndcg@10']:.4f}, test {ours['test']:.4f}, {last['cpu_s']:.1f} s; {ours['peak_mb']:.0f} MB")
    if peer and reached:
        share = found["share"]
        out.append(f"{name}: {share['cpu_s']:.3f} of the peer's processor time ({share['train_cpu_s']:.3f} without "
                   "validation)")
    return out


def _ranking_lines(row: dict[str, Any]) -> list[str]:
    what = f"{row['data']}, {row['users']:,} × {row['items']:,}"
    sides = [("kgrec", row["ours"] | row["ours"]["again"]), ("compiling", row["ours"] | row["ours"]["first"])]
    sides += [("peer", row["peer"])] if "peer" in row else []
    out = [f"{what if n == 0 else '':34s}{name:10s}{side['cpu_s']:9.2f}{side['seconds']:9.2f}{side['peak_mb']:9.0f}"
           f"{side['peak_mb'] - side['before_mb']:9.0f}{side['metrics']['ndcg@10']:9.4f}"
           for n, (name, side) in enumerate(sides)]
    if "peer" in row:
        same = "the same" if row["difference"] < SAME else "NOT the same"
        out.append(f"{'':34s}{row['ratio']['cpu_s']:.1f} × less processor time ({row['ratio']['first']:.1f} × with "
                   f"compilation); figures {same} to four decimals")
    return out


def _train(args: argparse.Namespace, name: str, folder: pathlib.Path, about: dict[str, Any]) -> dict[str, Any]:
    """One model by both sides, one after the other."""
    file, target, out = folder / "world.npz", args.target, {}
    if args.peer_python:
        home = folder / f"peer-{name}"
        home.mkdir()
        scores = folder / f"{name}.npy"
        words = f"--model={name}", f"--epochs={args.epochs}", f"--cpu={args.peer_cpu}", f"--scores={scores}"
        out["peer"] = _ask(_peer(args, "train", file, home, *words), "--peer-python", about, "peer_program")
        target = out["peer"]["best"]["ndcg@10"]
        judged = _ask(_ours("judge", file, f"--scores={scores}"), "this program", about, "program")
        out["judged"] = judged["ndcg@10"]
    out["ours"] = _ask(_ours("train", file, f"--model={name}", f"--target={target or NEVER}", f"--steps={args.steps}",
                             f"--every={args.every}", f"--seed={args.seed}"), "this program", about, "program")
    reached = out["ours"]["reached"]
    if args.peer_python and reached:
        out["share"] = {clock: reached[clock] / out["peer"]["best"][clock] for clock in ("cpu_s", "train_cpu_s")}
    return out | {"target": target}


def _rank(args: argparse.Namespace, name: str, arrays: dict[str, np.ndarray], folder: pathlib.Path,
          about: dict[str, Any]) -> dict[str, Any]:
    """One full ranking by both sides."""
    users, items = int(arrays["num_users"]), int(arrays["num_items"])
    out: dict[str, Any] = {"data": name, "users": users, "items": items}
    file = folder / f"rank-{len(about['ranking'])}.npz"
    np.savez(file, **arrays)
    out["ours"] = _ask(_ours("rank", file), "this program", about, "program")
    if args.peer_python:
        home = file.with_suffix("")
        home.mkdir()
        out["peer"] = _ask(_peer(args, "rank", file, home, f"--batch={args.peer_batch}"), "--peer-python", about,
                           "peer_program")
        peer, ours = out["peer"], out["ours"]
        out["ratio"] = {name: peer["cpu_s"] / ours[which]["cpu_s"] for name, which in
                        (("cpu_s", "again"), ("first", "first"))}
        out["difference"] = max(abs(value - ours["metrics"][metric]) for metric, value in peer["metrics"].items())
    return out


def _read(path: str) -> Any:
    from kgrec_jax.data.folder import read_folder

    return read_folder(path)


def _ours(order: str, file: pathlib.Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "kgrec_jax.bench.recommend_worker", order, str(file), *words]


def _peer(args: argparse.Namespace, order: str, file: pathlib.Path, home: pathlib.Path, *words: str) -> list[str]:
    script = pathlib.Path(__file__).with_name("recommend_peer.py")
    return [args.peer_python, str(script), order, str(file), str(home), *words]


def _check_peer(python: str) -> None:
    """KgrecError at once where the peer cannot be imported, and not after this program's minutes."""
    script = pathlib.Path(__file__).with_name("recommend_peer.py")
    _ask([python, str(script), "hello", "-", "-"], "--peer-python", {}, "peer_program")


def _ask(command: Sequence[str], what: str, about: dict[str, Any], name: str) -> dict[str, Any]:
    """The result of one process on one processor; what it says before is shown as it comes."""
    processors = sorted(os.sched_getaffinity(0))[:1] if hasattr(os, "sched_getaffinity") else []

    def pin() -> None:
        if processors:
            os.sched_setaffinity(0, processors)

    with tempfile.TemporaryFile("w+") as errors:
        try:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, preexec_fn=pin,
                                       env={**os.environ, **dict.fromkeys(_SINGLE, "1")})
        except OSError as error:
            raise KgrecError(f"{what}: found {command[0]}, which cannot be run ({error.strerror})") from None
        try:
            for line in process.stdout:
                if not line.startswith("{"):  # libraries may print, too
                    continue
                found = json.loads(line)
                if "error" in found:
                    raise KgrecError(f"{what}: {found['error']}")
                if "result" in found:
                    return found["result"]
                if "program" in found:
                    about[name] = found["program"]
                else:
                    print(f"{what}: " + ", ".join(f"{key} {value:.4g}" for key, value in found.items()),
                          file=sys.stderr, flush=True)
            code = process.wait()
            errors.seek(0)
            last = (errors.read().strip().splitlines() or ["no message"])[-1]
            raise KgrecError(f"{what}: found a program that ended with exit code {code}, expected an answer: {last}")
        finally:
            process.kill()
            process.communicate()
