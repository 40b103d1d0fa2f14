"""What the controls of a run found, in sentences and tables of the report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kgrec_jax.evaluation.render import HEADLINE, NDCG, metric_title, table_lines

_SOURCES = (("The graph", "no-graph", "random-graph", "a random graph of the same degrees"),
            ("Text", "no-text", "shuffled-text", "texts of other items"))
_AMONG = {"all": "on all items", "warm": "among warm items", "cold": "among cold ones"}
_METHOD = (
    "Each control is the run trained again on the same split without one of its sources, and ranks the same candidates "
    "for the same users. Differences are paired over users, ± one standard error{spread}. That error is of users alone: "
    "a random graph, an order of texts and a training are one draw for all of them, whose luck only several seeds show "
    "(--seeds). Taken over from the run: the pretrained encoder, the settings of its closed forms, text vectors that no "
    "graph has entered and the training of the entity table on triples alone, where its triples are the same. Chosen "
    "and learned anew: the mixture of the features, towers and gate, and the graph stage where the graph or what is "
    "read beside it is another.")


def control_lines(controls: Mapping[str, Any] | str, run: str) -> list[str]:
    """The section of report.md; `run` is the folder to name where the controls were not run."""
    out = ["## What each source is worth", ""]
    if isinstance(controls, str):
        return [*out, f"Controls: {controls}. `kgrec evaluate {run} --controls` trains the run again without its "
                "graph, its texts and its behaviour, and says here what each is worth.", ""]
    measured = {name: entry for name, entry in controls.items() if "skipped" not in entry}
    seeds = len(measured["run"]["seeds"])
    spread = f"; of each there are {seeds} trainings with seeds of their own" if seeds > 1 else ""
    out += [f"- {line}" for line in sentences(controls)] + ["", _METHOD.format(spread=spread), ""]
    for metric in HEADLINE:
        out += _table(measured, metric, seeds)
    skipped = [f"- {name}: left out, {entry['skipped']}" for name, entry in controls.items() if "skipped" in entry]
    return [*out, *skipped, ""] if skipped else out


def sentences(controls: Mapping[str, Any]) -> list[str]:
    """What a reader should take away, one line a source."""
    out = []
    for source, bare, scrambled, words in _SOURCES:
        entry, other = controls[bare], controls[scrambled]
        if "skipped" not in entry:
            line = f"{source} is worth {_worth(entry, 'paired')}"
            out.append(line + (f"; {words}: {_worth(other, 'worth')}." if "skipped" not in other else "."))
    if "skipped" not in controls["no-behaviour"]:
        out.append(f"What is learned from behaviour is worth {_worth(controls['no-behaviour'], 'paired')}, against a "
                   "ranking by the content of the items in a user's history alone.")
    if "skipped" not in (entry := controls["popularity-from-features"]):
        out.append(f"Popularity as features alone predict it, the same list for everybody, reaches "
                   f"{metric_title(NDCG)} {entry[NDCG]:.4f}; the run {controls['run'][NDCG]:.4f}.")
    return out


def _worth(entry: Mapping[str, Any], field: str) -> str:
    """ "+0.0123 ± 0.0031 NDCG@10 on all items, +0.0456 ± 0.0080 among cold ones" """
    sides = {"all": entry, **{side: entry[side] for side in ("cold",) if side in entry}}
    whole = "cold" in sides and sides["cold"]["users"] == entry["users"] and "warm" not in entry
    if whole:  # cold items are all that is ranked
        del sides["all"]
    return ", ".join(difference(of[field][NDCG]) + (f" {metric_title(NDCG)}" if n == 0 else "") + f" {_AMONG[side]}"
                     for n, (side, of) in enumerate(sides.items()))


def difference(pair: Mapping[str, float | None]) -> str:
    """ "+0.0123 ± 0.0031"; within two standard errors of 0 it is said that chance would do."""
    value, error = pair["difference"], pair["standard_error"]
    if error is None:
        return f"{value:+.4f}"
    return f"{value:+.4f} ± {error:.4f}" + (" (no more than chance)" if abs(value) < 2 * error else "")


def _table(measured: Mapping[str, Any], metric: str, seeds: int) -> Iterator[str]:
    """Control by control: its figure, and how far the run is ahead of it on all, warm and cold items."""
    sides = [side for side in _AMONG if any("cold" in entry for entry in measured.values()) or side == "all"]
    sides = [side for side in sides if side == "all" or any(side in entry for entry in measured.values())]
    heading = ["control", metric_title(metric), *(f"run ahead by ({side})" for side in sides)]
    rows = []
    for name, entry in measured.items():
        ahead = [(entry if side == "all" else entry.get(side, {})).get("paired", {}).get(metric) for side in sides]
        rows.append([name, f"{entry[metric]:.4f}", *(_cell(pair) for pair in ahead)])
        if seeds > 1:
            rows[-1].append(_deviation(entry, metric))
    yield from table_lines(heading + ["between seeds"] * (seeds > 1), rows)


def _cell(pair: Mapping[str, float | None] | None) -> str:
    if pair is None:
        return "–"
    error = pair["standard_error"]
    return f"{pair['difference']:+.4f}" + ("" if error is None else f" ± {error:.4f}")


def _deviation(entry: Mapping[str, Any], metric: str) -> str:
    """Standard deviation over seeds of how far the run is ahead on all items."""
    value = entry.get("paired", {}).get(metric, {}).get("seed_deviation")
    return "–" if value is None else f"{value:.4f}"


def console_lines(controls: Mapping[str, Any] | str) -> Sequence[str]:
    """The sentences for the terminal; nothing where no control was run."""
    return [] if isinstance(controls, str) else sentences(controls)
