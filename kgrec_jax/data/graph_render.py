"""The lines of a graph's report, and the picture of its degrees."""

from __future__ import annotations

import pathlib
import unicodedata
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from kgrec_jax.data.graph_report import GraphReport

_RELATIONS, _SHOWN = 40, 5  # relations in the table; findings of each kind
_WIDTH = 34  # columns of a relation's name


def render(report: GraphReport) -> list[str]:
    """Figures, the relations as a table, degrees, then findings and notes."""
    q, degree = report.quality, report.degree
    parts = ", ".join(f"{count:,} {part}" for part, count in report.triples.items() if part != "all")
    lines = [f"graph        {report.name}: {report.entities:,} entities, {len(report.relations):,} relations, "
             f"{sum(report.triples.values()):,} triples{f' ({parts})' if parts else ''}"]
    if report.items["all"]:
        lines.append(f"items        {report.items['all']:,}, {report.items['not_attached']:,} of them in no triple")
    lines.append(f"connected    {q['components']:,} components, the largest with {q['largest_component']:,} entities; "
                 f"{q['isolated_entities']:,} entities are in no triple")
    lines += _relations(report) + _degrees(report)
    lines += [f"  {hub['head_of'] + hub['tail_of']:9,}  {hub['entity']}" for hub in degree["hubs"]]
    return lines + _provenance(report) + _findings(report) + [f"note         {note}" for note in report.notes]


def _relations(report: GraphReport) -> list[str]:
    typed = any("head_type" in row or "tail_type" in row for row in report.relations)
    lines = [f"{_fit('relation')}  triples    heads    tails  kind  func  inv.f   sym."
             + ("  head type → tail type" if typed else "")]
    for row in report.relations[:_RELATIONS]:
        ends = " → ".join(f"{row[f'{e}_type']} {row[f'{e}_type_share']:.0%}" if f"{e}_type" in row else "?"
                          for e in ("head", "tail"))
        lines.append(f"{_fit(row['relation'])} {row['triples']:8,} {row['heads']:8,} {row['tails']:8,}  {row['kind']:4}"
                     f"  {row['functionality']:.2f}   {row['inverse_functionality']:.2f} {row['symmetric']:6.1%}"
                     + (f"  {ends}" if typed else ""))
    more = len(report.relations) - _RELATIONS
    return lines + [f"and {more:,} more relations (--out writes all of them)"] * (more > 0)


def _degrees(report: GraphReport) -> list[str]:
    degree = report.degree
    middle = degree["quantiles"]
    lines = [f"degrees      mean {degree['mean']:.1f}, median {middle['0.5']:,.0f}, 95 % at most "
             f"{middle['0.95']:,.0f}, largest {middle['1']:,.0f}"]
    most = max(row["entities"] for row in degree["table"])
    for row in degree["table"]:
        span = f"{row['from']:,}" if row["from"] == row["to"] else f"{row['from']:,} to {row['to']:,}"
        bar = "#" * -(-40 * row["entities"] // most)
        lines.append(f"  {span:>19} {row['entities']:9,}  {bar}".rstrip())
    return [*lines, "the most linked entities"]


def _provenance(report: GraphReport) -> list[str]:
    said = report.provenance
    files = ", ".join(f"{name} ({rows:,} rows)" if rows >= 0 else name for name, rows in said["files"].items())
    lines = [f"read from    {files}"]
    for source, rows in list(said["sources"].items())[:10]:
        lines.append(f"  {rows:9,}  {source}")
    if len(said["sources"]) > 10:
        lines.append(f"  and {len(said['sources']) - 10:,} more sources")
    if not said["sources"]:
        lines.append("  no source is stated for the triples")
    if said["stated_by_several"]:
        lines.append(f"  {said['stated_by_several']:,} triples are stated by several sources")
    if sure := said.get("confidence"):
        lines.append(f"  confidence {sure['mean']:.2f} on average, lowest {sure['lowest']:.2f}; {sure['below_1']:,} "
                     "rows are less than certain")
    return lines


def _findings(report: GraphReport) -> list[str]:
    q, lines = report.quality, []
    if q["repeated_rows"]:
        lines.append(f"{q['repeated_rows']:,} rows repeat a triple")
    if q["self_loops"]:
        loops = [row["relation"] for row in report.relations if row["loops"]]
        lines.append(f"{q['self_loops']:,} triples lead from an entity to itself ({_listed(loops)})")
    if q["entities_without_name"]:
        lines.append(f"{q['entities_without_name']:,} entities have no name "
                     f"({_listed(q['first_without_name'], False)})")
    if bare := q["relations_without_label"]:
        lines.append(f"{len(bare):,} relations have no label and are called by their id ({_listed(bare)})")
    for pair in report.pairs[:2 * _SHOWN]:
        lines.append(f"{pair['share_first']:.0%} of {pair['first']} ({pair['shared']:,} pairs) stand in "
                     f"{pair['second']} {'reversed' if pair['reverse'] else 'too'}, {pair['share_second']:.0%} the "
                     "other way round")
    if len(report.pairs) > 2 * _SHOWN:
        lines.append(f"{len(report.pairs) - 2 * _SHOWN:,} more pairs of relations hold each other's pairs")
    for part, leak in report.splits.items():
        lines.append(f"{part}: {leak['linked']:,} of {leak['triples']:,} triples join entities that a training triple "
                     f"joins ({leak['reversed']:,} in the other direction); {leak['unseen']:,} have an unseen entity")
    return [f"found        {line}" for line in lines + _type_findings(report)]


def _type_findings(report: GraphReport) -> list[str]:
    if not report.types:
        return []
    types = report.types
    lines = [f"{types['typed_entities']:,} of {report.entities:,} entities have one of {types['types']:,} types "
             f"({', '.join(types['said_by'])}); {types['in_several']:,} have several"]
    lines += [f"{e['entity']}: {', '.join(e['types'])}" for e in types["first_in_several"]]
    for wrong in (True, False):
        chosen = [f for f in types["at_odds"] if f["looks_wrong"] == wrong]
        for f in chosen[:_SHOWN]:
            lines.append(f"{f['relation']}: {1 - f['share']:.1%} of {f['typed']:,} typed {f['end']}s are no "
                         f"{f['type']}, such as {f['such_as']}{'' if wrong else ' (mixed types)'}")
        if len(chosen) > _SHOWN:
            lines.append(f"{len(chosen) - _SHOWN:,} more relations with {'few odd' if wrong else 'mixed'} types")
    return lines


def _listed(names: list[str], complete: bool = True) -> str:
    more = ", …" if len(names) > _SHOWN or not complete else ""
    return ", ".join(names[:_SHOWN]) + more


def _fit(text: str) -> str:
    """The text in `_WIDTH` columns of a terminal, where a Chinese or Korean character takes two."""
    out, width = "", 0
    for char in text:
        width += 2 if unicodedata.east_asian_width(char) in "WF" else 1
        if width >= _WIDTH:
            width -= 2 if unicodedata.east_asian_width(char) in "WF" else 1
            out, width = out + "…", width + 1
            break
        out += char
    return out + " " * (_WIDTH - width)


def draw_degrees(degree: np.ndarray, num_items: int, path: pathlib.Path) -> pathlib.Path:
    """The picture of [2, N] degrees as heads and tails: for each degree the share of entities with at least as many.

    Both axes are logarithmic, where a straight line is a power law. The picture appears whole or not at all.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    curves = {"all triples": degree.sum(0), "as head": degree[0], "as tail": degree[1]}
    if 0 < num_items < degree.shape[1]:
        curves["items, all triples"] = degree.sum(0)[:num_items]
    for label, values in curves.items():
        there = np.sort(values[values > 0])
        if len(there):
            at, first = np.unique(there, return_index=True)
            axis.plot(at, (len(there) - first) / len(values), marker=".", markersize=3, linewidth=1, label=label)
    axis.set(xscale="log", yscale="log", xlabel="degree (triples of an entity)",
             ylabel="share of entities with at least this degree")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=120)
    temporary.replace(path)
    return path
