"""One experiment under several seeds, in figures: what another training would change, and what fusion is worth.

Two errors are told apart. That of the seeds (Student's t over the trainings) says how far a mean would move with other
trainings on the same users; that of users (bootstrap in each report, the paired error here) says how far it would move
with other users.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from kgrec_jax.errors import KgrecError
from kgrec_jax.evaluation.ranking import RankingResult
from kgrec_jax.evaluation.render import HEADLINE, metric_title, table_lines
from kgrec_jax.evaluation.report import Report
from kgrec_jax.evaluation.significance import paired_over_seeds
from kgrec_jax.tracking import NPZ_ERRORS, write_npz

FORMAT_VERSION = 1
SIDES = ("warm", "cold")
LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class PerUser:
    """The headline metrics of every row of one run, user by user."""

    users: np.ndarray  # [n] int32 rows of the users
    values: Mapping[str, Mapping[str, np.ndarray]]  # row -> metric -> [n] float64

    @staticmethod
    def of(ranked: Mapping[str, RankingResult]) -> PerUser:
        """Of rankings of the same users."""
        return PerUser(next(iter(ranked.values())).users, {
            name: {m: result.per_user[m] for m in HEADLINE if m in result.per_user} for name, result in ranked.items()})

    def save(self, path: pathlib.Path) -> None:
        """Writes the file, whole or not at all."""
        arrays = {f"{name}/{metric}": v for name, metrics in self.values.items() for metric, v in metrics.items()}
        write_npz(path, users=self.users, **arrays)

    @staticmethod
    def load(path: pathlib.Path) -> PerUser:
        """Reads what `save` wrote; KgrecError where it is absent or damaged."""
        again = f"run kgrec evaluate {path.parent} and then the same command again"
        if not path.is_file():
            raise KgrecError(f"{path}: found no such file, expected the metrics of each user; {again}")
        values: dict[str, dict[str, np.ndarray]] = {}
        try:
            with np.load(path, allow_pickle=False) as file:
                for key in file.files:
                    name, slash, metric = key.rpartition("/")
                    if slash:
                        values.setdefault(name, {})[metric] = file[key]
                return PerUser(file["users"], values)
        except NPZ_ERRORS as error:
            reason = str(error).partition("\n")[0]
            raise KgrecError(f"{path}: found a damaged file ({reason}), expected the metrics of each user; {again}"
                             ) from None


def summarise(seeds: Sequence[int], reports: Sequence[Report], users: Sequence[PerUser]) -> dict[str, Any]:
    """What seeds.json holds of the runs of `seeds`, one report and one `PerUser` each.

    `models`: row -> metric -> `spread`, "warm" and "cold" like it. `paired`: metric -> fusion minus the best of the
    other rows, see `paired`. A row that some runs lack is the mean of the others, which `n` counts.
    """
    first = reports[0]
    rows = list(dict.fromkeys(name for report in reports for name in report.models))
    models: dict[str, Any] = {}
    for row in rows:
        entries = [report.models[row] for report in reports if row in report.models]
        models[row] = _spreads(entries)
        for side in SIDES:
            held = [entry[side] for entry in entries if side in entry]
            if held:
                models[row][side] = _spreads(held)
    return {"format_version": FORMAT_VERSION, "seeds": list(seeds), "name": first.name, "split": first.split,
            "fit_on": first.fit_on, "candidates": first.candidates, "users": first.users,
            "reference": first.reference, "models": models, "paired": paired(models, first.reference, users)}


def _spreads(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Metric -> `spread`, of the metrics of a row ("ndcg@10", …) in some runs."""
    names = dict.fromkeys(name for entry in entries for name, value in entry.items()
                          if "@" in name and isinstance(value, (int, float)))
    return {name: spread([entry[name] for entry in entries if name in entry]) for name in names}


def spread(values: Sequence[float]) -> dict[str, Any]:
    """{mean, deviation, ci95: [low, high], n, values} over seeds; what one seed cannot tell is None.

    The deviation is the sample's (n − 1); the interval is Student's t of the mean (Student 1908), which takes the
    seeds' figures as normal: 4.3 standard errors to each side of three seeds.
    """
    from scipy.stats import t

    each = np.asarray(values, np.float64)
    out: dict[str, Any] = {"mean": float(each.mean()), "deviation": None, "ci95": None, "n": len(each)}
    if len(each) > 1:
        deviation = float(each.std(ddof=1))
        half = float(t.ppf((1 + LEVEL) / 2, len(each) - 1)) * deviation / math.sqrt(len(each))
        out |= {"deviation": deviation, "ci95": [out["mean"] - half, out["mean"] + half]}
    return out | {"values": each.tolist()}


def paired(models: Mapping[str, Any], reference: str, users: Sequence[PerUser]) -> dict[str, dict[str, Any]]:
    """Metric -> {row, difference, standard_error, seed_deviation, users}: reference minus the best of the other rows.

    The best is that of the highest mean over seeds, so the test has chosen the rival and the difference is, if
    anything, too small. Each user counts with its mean over the seeds; only users whom every seed has measured count
    (with `fuse.eval_users` each seed may have drawn others). A metric without a rival or without users is left out.
    """
    common = users[0].users
    for one in users[1:]:
        common = np.intersect1d(common, one.users)
    rows = [np.flatnonzero(np.isin(one.users, common)) for one in users]
    rows = [r[np.argsort(one.users[r], kind="stable")] for r, one in zip(rows, users)]
    out: dict[str, dict[str, Any]] = {}
    for metric in HEADLINE:
        everywhere = [name for name in models if all(metric in one.values.get(name, {}) for one in users)]
        rivals = [name for name in everywhere if name != reference]
        if reference not in everywhere or not rivals or not len(common):
            continue
        best = max(rivals, key=lambda name: models[name][metric]["mean"])
        own, other = (np.stack([one.values[name][metric][r] for r, one in zip(rows, users)])  # [S, n]
                      for name in (reference, best))
        mean, error, deviation = paired_over_seeds(own, other)
        out[metric] = {"row": best, "difference": mean, "standard_error": error if math.isfinite(error) else None,
                       "seed_deviation": deviation if math.isfinite(deviation) else None, "users": len(common)}
    return out


# --- in words -----------------------------------------------------------------------------------------------------


def cell(entry: Mapping[str, Any] | None) -> str:
    """ "0.3364 ± 0.0012 [0.3334, 0.3394]"; only the mean of a single seed, a dash for a row without the metric."""
    if entry is None:
        return "–"
    if entry["ci95"] is None:
        return f"{entry['mean']:.4f}"
    return f"{entry['mean']:.4f} ± {entry['deviation']:.4f} [{entry['ci95'][0]:.4f}, {entry['ci95'][1]:.4f}]"


def paired_lines(summary: Mapping[str, Any]) -> list[str]:
    """Fusion minus the best of the other rows, one line a metric."""
    lines = []
    for metric, found in summary["paired"].items():
        error, deviation = found["standard_error"], found["seed_deviation"]
        lines.append(f"{metric_title(metric)}: {summary['reference']} minus {found['row']}, the best of the others: "
                     f"{found['difference']:+.4f}" + ("" if error is None else f" ± {error:.4f}")
                     + f" (standard error over {found['users']:,} users"
                     + (")" if deviation is None else f"; deviation between seeds {deviation:.4f})"))
    return lines


def markdown(summary: Mapping[str, Any]) -> str:
    """seeds.md."""
    return "\n".join(_lines(summary)) + "\n"


def _lines(summary: Mapping[str, Any]) -> Iterator[str]:
    seeds, models = summary["seeds"], summary["models"]
    yield f"# {summary['name']}, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
    yield ""
    yield (f"Seeds {', '.join(map(str, seeds))} of one config on one split ({summary['split']}; fitted on "
           f"{summary['fit_on']}): {summary['candidates']:,} candidates, {summary['users']:,} users. Each figure is "
           "the mean over seeds ± the standard deviation between them; brackets hold its 95 % interval by Student's t "
           "over the seeds: what other trainings would give on these users. What other users would give is in each "
           "seed's own report: 95 % bootstrap intervals over users, `seed-*/report.md`. A row of deviation 0 draws "
           "nothing.")
    yield ""
    yield from table_lines(["model", *map(metric_title, HEADLINE)],
                           [[name, *(cell(entry.get(m)) for m in HEADLINE)] for name, entry in models.items()])
    lines = paired_lines(summary)
    if lines:
        yield from (f"- {line}" for line in lines)
        yield ""
        yield ("The best of the others is the one of the highest mean on these very test users, so that a difference is, "
               "if anything, too small.")
        yield ""
    for side in SIDES:
        held = {name: entry[side] for name, entry in models.items() if side in entry}
        if held and any(SIDES[1] in entry for entry in models.values()):
            yield f"## Among {side} items"
            yield ""
            yield from table_lines(["model", *map(metric_title, HEADLINE)],
                                   [[name, *(cell(entry.get(m)) for m in HEADLINE)] for name, entry in held.items()])
    yield "## All metrics (mean ± standard deviation)"
    yield ""
    metrics = list(dict.fromkeys(m for entry in models.values() for m in entry if "@" in m))
    yield from table_lines(["model", *map(metric_title, metrics)],
                           [[name, *(_short(entry.get(m)) for m in metrics)] for name, entry in models.items()])


def _short(entry: Mapping[str, Any] | None) -> str:
    if entry is None or entry["deviation"] is None:
        return "–" if entry is None else f"{entry['mean']:.4f}"
    return f"{entry['mean']:.4f} ± {entry['deviation']:.4f}"
