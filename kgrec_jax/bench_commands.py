"""The door `kgrec bench NAME`: one entry a bench, each a function of its own arguments."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from kgrec_jax.errors import KgrecError


@dataclasses.dataclass(frozen=True)
class Bench:
    """One bench: what it measures, and `run(argv) -> exit code`, which prints its own --help."""

    summary: str
    run: Callable[[list[str]], int]


def _language(argv: list[str]) -> int:
    from kgrec_jax.bench import language

    return language.run(argv)


def _peft(argv: list[str]) -> int:
    from kgrec_jax.bench import peft

    return peft.run(argv)


def _graph(argv: list[str]) -> int:
    from kgrec_jax.bench import graph

    return graph.run(argv)


def _recommend(argv: list[str]) -> int:
    from kgrec_jax.bench import recommend

    return recommend.run(argv)


def _scale(argv: list[str]) -> int:
    from kgrec_jax.bench import scale

    return scale.run(argv)


# Another bench is a function beside those above (JAX is imported inside it) and an entry here.
BENCHES = {
    "language": Bench("masked-LM training and encoding: tokens/s, utilisation, peak memory", _language),
    "graph": Bench("link prediction: training queries/s, sampled positives/s, filtered ranks/s, memory", _graph),
    "peft": Bench("every way to tune an encoder: share, memory, tokens/s, quality on a graph task", _peft),
    "recommend": Bench("graph recommenders and full ranking beside RecBole: processor seconds, memory, NDCG@10",
                       _recommend),
    "scale": Bench("a log of millions of rows: seconds and memory of reading, iALS, towers, ranking", _scale),
}


def bench(argv: list[str]) -> int:
    """`kgrec bench NAME …`; KgrecError for a name that is none."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage(), end="")
        return 0
    if argv[0] not in BENCHES:
        raise KgrecError(f"bench: found {argv[0]!r}, expected one of {', '.join(BENCHES)}; see kgrec bench --help")
    return BENCHES[argv[0]].run(argv[1:])


def usage() -> str:
    """What `kgrec bench --help` shows."""
    lines = "".join(f"  kgrec bench {name:<10} {entry.summary}\n" for name, entry in BENCHES.items())
    return f"Measure speed, memory and quality on the device at hand.\n\n{lines}\nkgrec bench NAME --help says more.\n"
