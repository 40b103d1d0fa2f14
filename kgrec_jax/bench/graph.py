"""`kgrec bench graph`: link prediction, training and ranking, beside PyKEEN where it is at hand.

ComplEx against all entities over merged queries, RotatE with one sampled negative a positive (only rows in use move),
and filtered ranks of test triples in both directions. Both programs live in processes of their own for the whole
bench and take turns at every measure, so that a round compares like with like on a machine that does other work too;
each measure has warmed up before its clock starts. A ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from kgrec_jax.arguments import Parser, positive
from kgrec_jax.errors import KgrecError
from kgrec_jax.machine import cpu_threads

MEASURES = {"link": "ComplEx 1-vs-all, queries/s", "sampled": "RotatE, positives/s", "evaluation": "filtered ranks/s"}
SAMPLED_STEPS = 10  # steps with sampled negatives for each against all entities, which takes that much longer
# Entities, relations and training, validation and test triples of FB15k-237.
ENTITIES, RELATIONS, PARTS = 14_541, 237, (272_115, 17_535, 20_466)


def _parser() -> Parser:
    out = Parser("bench graph", f"""Measure link prediction: training queries, sampled positives and ranks a second.

  kgrec bench graph --data FB15K-237 --peer-python pykeen-env/bin/python

{__doc__.partition(chr(10) * 2)[2]}""")
    out.add_argument("--data", default="", metavar="FOLDER",
                     help="a dataset folder with a graph; default: a generated one of FB15k-237's size")
    out.add_argument("--peer-python", default="", metavar="PATH",
                     help="an interpreter with torch and pykeen: the peer runs too")
    out.add_argument("--dim", type=positive, default=128, help="complex numbers of a row (default 128)")
    out.add_argument("--batch", type=positive, default=1024, help="queries, or positives, of a step (default 1024)")
    out.add_argument("--steps", type=positive, default=15,
                     help=f"timed steps of a round, {SAMPLED_STEPS} times as many with sampled negatives (default 15)")
    out.add_argument("--triples", type=positive, default=2048, help="test triples that are ranked (default 2048)")
    out.add_argument("--optimizer", choices=("adagrad", "adamw"), default="adagrad",
                     help="of this program's ComplEx; PyKEEN's is Adam (default adagrad, as in kgrec graph)")
    out.add_argument("--rounds", type=positive, default=3, help="turns of each measure (default 3)")
    out.add_argument("--threads", type=int, default=0, help="processor threads; 0: all that this process may use")
    out.add_argument("--json", action="store_true", help="one JSON object on the standard output")
    return out


def run(argv: list[str]) -> int:
    """Runs the benchmark; bad options and a peer that cannot run are KgrecErrors."""
    args = _parser().parse_args(argv)
    args.threads = args.threads or cpu_threads()
    triples, part, entities, relations = _graph(args)
    train, test = triples[part == 0], triples[part == 2]
    if not len(train) or not len(test):
        raise KgrecError(f"--data: found {len(train):,} training and {len(test):,} test triples in {args.data}, "
                         "expected some of both: triples.train.tsv and triples.test.tsv")
    args.steps, sampled = _steps(args, train, relations)
    counts = {"link": args.steps, "sampled": sampled, "evaluation": min(args.triples, len(test))}
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        file = pathlib.Path(scratch) / "graph.npz"
        test = np.random.default_rng(0).permutation(test)  # the first of them are a sample
        np.savez(file, train=train, known=triples, test=test, num_entities=entities, num_relations=relations)
        words = [str(file), *(f"--{name}={getattr(args, name)}" for name in ("dim", "batch", "threads"))]
        ours = stack.enter_context(_program([sys.executable, "-m", "kgrec_jax.bench.graph_worker", *words,
                                             f"--optimizer={args.optimizer}"], args.threads, "this program"))
        peer = None
        if args.peer_python:
            script = pathlib.Path(__file__).with_name("graph_peer.py")
            peer = stack.enter_context(_program([args.peer_python, str(script), *words], args.threads,
                                                "--peer-python"))
        rounds = [_round(ours, peer, counts, number) for number in range(args.rounds)]
    about = {"data": pathlib.Path(args.data).name or "generated", "entities": entities, "relations": relations,
             "triples": len(train), "dim": args.dim, "batch": args.batch, "threads": args.threads, "steps": counts,
             "optimizer": args.optimizer, "program": ours.name, **({"peer_program": peer.name} if peer else {})}
    result = summary(rounds) | about
    print(json.dumps(result) if args.json else "\n".join(lines(result)))
    return 0


def summary(rounds: Sequence[dict]) -> dict[str, Any]:
    """The result of rounds {"ours" and, with a peer, "peer": {measure: answer}}: medians, and every round's ratio."""
    sides = [side for side in ("ours", "peer") if side in rounds[0]]
    out: dict[str, Any] = {"format_version": 1, "rounds": list(rounds)}
    for side in sides:
        answers = [one[side] for one in rounds]
        rates = {name: [_rate(one[name]) for one in answers] for name in MEASURES}
        out[side] = {f"{name}_per_s": statistics.median(found) for name, found in rates.items()}
        out[side]["mrr"] = answers[-1]["evaluation"]["mrr"]
        out[side]["peak_mb"] = max(one[name]["peak_mb"] for one in answers for name in MEASURES)
    link, peak = [one["ours"]["link"] for one in rounds], [one["ours"]["peak"] for one in rounds]
    out["queries"] = link[0]["queries"]
    for side in sides:
        out[side]["epoch_s"] = out["queries"] / out[side]["link_per_s"]
    out["ours"] |= {"compile_s": peak[-1]["compile_s"], "gflops": statistics.median([one["gflops"] for one in link]),
                    "matmul_peak_gflops": statistics.median([one["matmul_gflops"] for one in peak])}
    out["device"] = peak[0]["device"]
    if "peer" in sides:
        out["ratios"] = {name: [_rate(one["ours"][name]) / _rate(one["peer"][name]) for one in rounds]
                         for name in MEASURES}
        out["cpu_ratios"] = {name: [_rate(one["ours"][name], "cpu_s") / _rate(one["peer"][name], "cpu_s")
                                    for one in rounds] for name in MEASURES}
        out["ratio"] = {name: statistics.median(found) for name, found in out["ratios"].items()}
        out["ratio"]["peak_mb"] = out["ours"]["peak_mb"] / out["peer"]["peak_mb"]
    return out


def lines(result: dict[str, Any]) -> list[str]:
    """The result in words."""
    ours, peer = result["ours"], result.get("peer")
    out = [f"{result['data']}: {result['entities']:,} entities, {result['triples']:,} triples, {result['queries']:,} "
           f"distinct queries; {result['dim']} complex numbers a row, batch {result['batch']}, {result['threads']} "
           f"threads, {result['device']}", f"{'':30s}{'kgrec':>12s}" + (f"{'peer':>12s}{'ratio':>8s}  rounds" if peer
                                                                          else "")]

    def row(words: str, name: str, form: str, rounds: Sequence[float] = ()) -> None:
        told = f"{words:30s}{ours[name]:12{form}}"
        if peer and name in peer:
            ratio = result["ratio"].get(name.removesuffix("_per_s"), ours[name] / peer[name])
            told += f"{peer[name]:12{form}}{ratio:8.2f}"
            told += "".join(f"{'  ' if k == 0 else ' '}{each:.2f}" for k, each in enumerate(rounds))
        out.append(told)

    for name, words in MEASURES.items():
        row(words, f"{name}_per_s", ",.0f", result.get("ratios", {}).get(name, ()))
    if peer:
        told = ", ".join(f"{name} {statistics.median(found):.2f}" for name, found in result["cpu_ratios"].items())
        out.append(f"ratios by processor seconds, which other work on the machine hardly changes: {told}")
    row("ComplEx, seconds an epoch", "epoch_s", ",.1f")
    row("peak memory, MB", "peak_mb", ",.0f")
    row("compilation, s", "compile_s", ",.1f")
    row("ComplEx, GFLOP/s", "gflops", ",.0f")
    row("measured matmul peak, GFLOP/s", "matmul_peak_gflops", ",.0f")
    out.append(f"{result['program']}, {result['optimizer']} (RotatE: row-wise Adagrad of the rows in use)" + (
        f"; peer: {result['peer_program']}, Adam" if peer else ""))
    return out


def generated_graph(entities: int = ENTITIES, relations: int = RELATIONS, parts: Sequence[int] = PARTS,
                    seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(triples [T, 3] int32, each once; part [T] int8) with a few frequent relations and entities, many rare ones."""
    rng, total = np.random.default_rng(seed), sum(parts)
    if total > entities * entities * relations // 4:
        raise KgrecError(f"generated graph: found {total:,} triples of {entities:,} entities and {relations:,} "
                         "relations, expected at most a quarter of all possible ones")
    places = np.stack([rng.permutation(entities) for _ in range(2)])  # who is frequent as a head, and as a tail
    keys = np.zeros(0, np.int64)
    while len(keys) < total:
        draws = rng.random((3, total))
        relation = (relations * draws[0] ** 3).astype(np.int64)
        # The place among the frequent ones is log-uniform (Zipf's law), and each relation shifts it a little.
        head, tail = (place[((entities ** draw).astype(np.int64) - 1 + shift * relation) % entities]
                      for place, shift, draw in zip(places, (7, 3), draws[1:], strict=True))
        keys = np.union1d(keys, (head * relations + relation) * entities + tail)
    keys = rng.permutation(keys)[:total]
    pairs, tail = np.divmod(keys, entities)
    triples = np.stack([pairs // relations, pairs % relations, tail], axis=1).astype(np.int32)
    return triples, np.repeat(np.arange(len(parts)), parts).astype(np.int8)


def _graph(args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray, int, int]:
    """(triples, part, entities, relations) of the folder, or generated."""
    if not args.data:
        return *generated_graph(), ENTITIES, RELATIONS
    from kgrec_jax.data.folder import read_folder

    graph = read_folder(args.data).graph
    return graph.triples, graph.part, graph.num_entities, graph.num_relations


def _steps(args: argparse.Namespace, train: np.ndarray, relations: int) -> tuple[int, int]:
    """Timed steps against all entities, and with sampled negatives: no more than an epoch of the peer has."""
    queries = len(np.unique(np.concatenate([train[:, 0].astype(np.int64) * relations + train[:, 1],
                                            -1 - train[:, 2].astype(np.int64) * relations - train[:, 1]])))
    room = [count // args.batch - 2 for count in (queries, len(train))]  # two batches warm up
    if min(room) < 1:
        raise KgrecError(f"--batch: found {args.batch}, expected at most a third of the {queries:,} distinct queries "
                         f"and of the {len(train):,} training triples")
    return min(args.steps, room[0]), min(args.steps * SAMPLED_STEPS, room[1])


class _Program:
    """A process that answers lines of JSON with lines of JSON."""

    def __init__(self, process: subprocess.Popen, errors: Any, what: str):
        self.process, self.errors, self.what = process, errors, what
        self.name = self._answer()["program"]

    def ask(self, measure: str, count: int) -> dict:
        """The answer to one order."""
        try:
            self.process.stdin.write(json.dumps({"measure": measure, "count": count}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # what it said before it ended is told below
        return self._answer()

    def _answer(self) -> dict:
        for line in self.process.stdout:
            if line.startswith("{"):  # libraries may print, too
                found = json.loads(line)
                if "error" in found:
                    raise KgrecError(f"{self.what}: {found['error']}")
                return found
        code = self.process.wait()
        self.errors.seek(0)
        last = (self.errors.read().strip().splitlines() or ["no message"])[-1]
        raise KgrecError(f"{self.what}: found a program that ended with exit code {code}, expected an answer: {last}")


@contextmanager
def _program(command: list[str], threads: int, what: str) -> Iterator[_Program]:
    """The program of a command, on so many threads; it is ended on the way out."""
    keep = set(sorted(os.sched_getaffinity(0))[:threads]) if hasattr(os, "sched_getaffinity") else None
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}

    def pin() -> None:
        if keep:
            os.sched_setaffinity(0, keep)

    with tempfile.TemporaryFile("w+") as errors:
        try:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                                       env=env, preexec_fn=pin)
        except OSError as error:
            raise KgrecError(f"{what}: found {command[0]}, which cannot be run ({error.strerror})") from None
        try:
            yield _Program(process, errors, what)
        finally:
            process.kill()
            process.communicate()


def _round(ours: _Program, peer: _Program | None, counts: dict[str, int], number: int) -> dict[str, dict]:
    """Every measure by each program; who begins changes from round to round."""
    sides = {"ours": ours, "peer": peer} if peer else {"ours": ours}
    found: dict[str, dict] = {side: {} for side in sides}
    for measure, count in counts.items():
        for side in sorted(sides, reverse=bool(number % 2)):
            found[side][measure] = sides[side].ask(measure, count)
            print(f"round {number + 1}, {MEASURES[measure]}: {side} {_rate(found[side][measure]):,.0f}",
                  file=sys.stderr)
    found["ours"]["peak"] = ours.ask("peak", 0)
    return found


def _rate(answer: dict, clock: str = "seconds") -> float:
    return answer["count"] / answer[clock]
