"""The report in words: Markdown for the run folder, tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kgrec_jax.evaluation.report import Report

NDCG, RECALL = "ndcg@10", "recall@20"
HEADLINE = (NDCG, RECALL)
LINK_METRICS = ("mrr", "hits@1", "hits@3", "hits@10")
# What the lists are like beside being right (`beyond_accuracy`), in the order of the table.
BEYOND = ("coverage", "gini", "novelty", "diversity", "personalisation", "miscalibration")
_BEYOND_WORDS = (
    "Coverage: share of the candidates in anybody's list. Gini: how unevenly they are shown (0: all alike). Novelty: "
    "−log2 of the share of users who have an item, in bits. Diversity: 1 − cosine between the items of a list. "
    "Personalisation: 1 − what two users' lists have in common. Miscalibration: divergence of a list's kinds of items "
    "from the history's, in nats (0: the same shares).")
_TITLES = {"ndcg": "NDCG", "recall": "Recall", "mrr": "MRR", "map": "MAP", "hit": "Hit", "hits": "Hits",
           "precision": "Precision"}


def metric_title(metric: str) -> str:
    """ "ndcg@10" -> "NDCG@10"."""
    name, _, k = metric.partition("@")
    return f"{_TITLES.get(name, name)}@{k}" if k else _TITLES.get(name, name)


def _number(entry: Mapping[str, Any] | None, metric: str) -> str:
    value = (entry or {}).get(metric)
    return "–" if value is None else f"{value:.4f}"


def _interval(entry: Mapping[str, Any], metric: str) -> str:
    """The value with its interval: "0.3282 [0.3120, 0.3441]"."""
    interval = entry.get("ci95", {}).get(metric)
    return _number(entry, metric) + (f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else "")


def _difference(report: Report, model: str, metric: str) -> str:
    """Reference minus model, ± its standard error."""
    pair = report.paired.get(model, {}).get(metric)
    if pair is None:
        return "–"
    error = pair["standard_error"]
    return f"{pair['difference']:+.4f}" + ("" if error is None else f" ± {error:.4f}")


def table_lines(header: list[str], rows: list[list[str]]) -> Iterator[str]:
    """A Markdown table and an empty line."""
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    for row in rows:
        yield "| " + " | ".join(_cell(c) for c in row) + " |"
    yield ""


def _cell(text: Any) -> str:
    return " ".join(str(text).replace("|", "\\|").split())


def markdown(report: Report, plots: Sequence[str], more: Sequence[str] = ()) -> str:
    """The whole report as Markdown; `plots` are paths of pictures relative to it, `more` lines of a further section."""
    return "\n".join(_lines(report, plots, more)) + "\n"


def _lines(report: Report, plots: Sequence[str], more: Sequence[str]) -> Iterator[str]:
    yield f"# {_cell(report.name)}"
    yield ""
    if report.models:
        yield from _recommendation(report)
        yield from more
    if report.link_prediction:
        yield from _link_prediction(report)
    yield from _example(report.example)
    for plot in plots:
        yield f"![{Path(plot).stem}]({plot})"
        yield ""
    if report.timing:
        yield "## Time"
        yield ""
        yield from table_lines(["stage", "seconds"], [[k, f"{v:.1f}"] for k, v in report.timing.items()])
    for heading, lines in (
        ("Left out", [f"{name}: {_cell(reason)}" for name, reason in report.skipped.items()]),
        ("Notes", [_cell(note) for note in report.notes]),
    ):
        if lines:
            yield f"## {heading}"
            yield ""
            yield from (f"- {line}" for line in lines)
            yield ""


def _recommendation(report: Report) -> Iterator[str]:
    yield (
        f"Every model ranks the {report.candidates:,} candidates, without those that the user knows already, for "
        f"{report.users:,} users. Split: {report.split}. Fitted on: {report.fit_on}. History: {report.history}. "
        "Items with equal scores count with the mean over their orders; "
        "brackets hold 95 % bootstrap intervals over users."
    )
    yield ""
    metrics = [m for m in HEADLINE if any(m in e for e in report.models.values())]
    yield from table_lines(
        ["model", *map(metric_title, metrics), *(f"{report.reference} ahead by ({metric_title(m)})" for m in metrics)],
        [[name, *(_interval(e, m) for m in metrics), *(_difference(report, name, m) for m in metrics)]
         for name, e in report.models.items()],
    )
    yield from _sides(report, metrics)
    yield from _all_metrics(report)
    yield from _buckets(report)


def link_rows(link_prediction: Mapping[str, Any]) -> list[tuple[str, Mapping[str, float]]]:
    """(scorer, its test metrics): first the score that decides, then structure and text apart where both are."""
    rows = [("all" if "structure" in link_prediction else "structure", link_prediction.get("test", {}))]
    rows += [(name, part["test"]) for name, part in link_prediction.items()
             if name not in ("test", "valid") and isinstance(part, Mapping) and "test" in part]
    return [(name, entry) for name, entry in rows if entry]


def _link_prediction(report: Report) -> Iterator[str]:
    yield "## Link prediction (filtered, both directions, test)"
    yield ""
    rows = link_rows(report.link_prediction)
    if not rows:
        yield _cell(report.link_prediction.get("skipped", ""))
        yield ""
        return
    names = [name for name in LINK_METRICS if all(name in entry for _, entry in rows)]
    yield from table_lines(["score", *map(metric_title, names), "queries"],
                     [[name, *(f"{entry[m]:.4f}" for m in names), f"{entry.get('queries', 0):,.0f}"]
                      for name, entry in rows])


def _sides(report: Report, metrics: list[str]) -> Iterator[str]:
    """Warm and cold items apart, where there are cold ones."""
    if not any("cold" in e for e in report.models.values()):
        return
    yield "## Warm and cold items"
    yield ""
    some = next(e for e in report.models.values() if "cold" in e)
    for side, words in (("warm", "with"), ("cold", "without")):
        if side in some:
            size, users = some[side]["candidates"], some[side]["users"]
            yield f"- {side}: the {size:,} items {words} fitted interactions, among themselves, for {users:,} users"
    yield ""
    yield from table_lines(
        ["model", *(f"{side} {metric_title(m)}" for side in ("warm", "cold") for m in metrics)],
        [[name, *(_interval(e.get(side, {}), m) for side in ("warm", "cold") for m in metrics)]
         for name, e in report.models.items()],
    )


def _all_metrics(report: Report) -> Iterator[str]:
    found = list(dict.fromkeys(m for e in report.models.values() for m in e if "@" in m))
    beyond = [m for name in BEYOND for m in found if m.partition("@")[0] == name]
    for heading, metrics in (("All metrics", [m for m in found if m not in beyond]), ("Beyond accuracy", beyond)):
        if not metrics:
            continue
        yield f"## {heading}"
        yield ""
        if metrics is beyond:
            yield _BEYOND_WORDS
            yield ""
        rows = [[name, *(_number(e, m) for m in metrics)] for name, e in report.models.items()]
        yield from table_lines(["model", *map(metric_title, metrics)], rows)


def _buckets(report: Report) -> Iterator[str]:
    for kind, heading, metric in (
        ("item_popularity", "Recall by popularity of the item", RECALL),
        ("user_activity", "NDCG by activity of the user", NDCG),
    ):
        buckets = {name: e["buckets"].get(kind, {}) for name, e in report.models.items() if "buckets" in e}
        levels = list(dict.fromkeys(level for b in buckets.values() for level in b))
        if levels:
            yield f"## {heading} ({metric_title(metric)})"
            yield ""
            rows = [[name, *(_number(b.get(level), metric) for level in levels)] for name, b in buckets.items()]
            yield from table_lines(["model", *levels], rows)


def _example(example: Mapping[str, Any]) -> Iterator[str]:
    if not example:
        return
    yield f"## For user {_cell(example['user'])}"
    yield ""
    if example.get("history"):
        yield "Latest of the history: " + ", ".join(_cell(t) for t in example["history"]) + "."
        yield ""
    rows = [[str(n), r["title"], f"{r['score']:.3f}", r["reason"]] for n, r in enumerate(example["recommendations"], 1)]
    yield from table_lines(["", "title", "score", "why"], rows)


def _links_in_words(report: Report) -> Iterator[str]:
    for name, entry in link_rows(report.link_prediction):
        yield f"link prediction, {name}: " + ", ".join(f"{metric_title(m)} {entry[m]:.4f}" for m in LINK_METRICS)
    if "skipped" in report.link_prediction:
        yield f"link prediction: skipped, {report.link_prediction['skipped']}"
    for name, reason in report.skipped.items():
        yield f"{name}: skipped, {reason}"


def print_report(report: Report, console: Any = None) -> None:
    """The headline figures and the example on the terminal; `console` is a rich Console (default: standard output)."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console()
    if not report.models:
        for line in _links_in_words(report):
            console.print(Text(line))
        return
    sides = ("", "warm", "cold") if any("cold" in e for e in report.models.values()) else ("",)
    metrics = [m for m in HEADLINE if any(m in e for e in report.models.values())]
    title = Text(f"{report.name}: {report.users:,} users, {report.candidates:,} candidates")
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("model", no_wrap=True)
    for side in sides:
        for metric in metrics:
            heading = f"{side}\n{metric_title(metric)}".strip()
            table.add_column(heading, justify="right", no_wrap=True, vertical="bottom")
    for name, entry in report.models.items():
        table.add_row(name, *(_number(entry.get(side) if side else entry, m) for side in sides for m in metrics))
    console.print(table)
    for metric in metrics:
        rivals = [name for name in report.paired if metric in report.paired[name]]
        if rivals:
            best = min(rivals, key=lambda name: report.paired[name][metric]["difference"])
            ahead = f"{metric_title(metric)} {_difference(report, best, metric)}"
            console.print(Text(f"{report.reference} minus {best}, the best of the others: {ahead}"))
    for name, reason in report.skipped.items():
        console.print(Text(f"{name}: skipped, {reason}"))
    if report.example:
        table = Table(title=Text(f"\nfor user {report.example['user']}"), title_justify="left", box=SIMPLE_HEAD)
        table.add_column("title")
        table.add_column("why")
        for row in report.example["recommendations"]:
            table.add_row(Text(row["title"]), Text(row["reason"]))
        console.print(table)
