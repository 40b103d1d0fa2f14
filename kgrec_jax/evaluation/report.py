"""What a run was worth, in figures: report.json, and beside it the same in words (`render.py`)."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kgrec_jax.errors import KgrecError
from kgrec_jax.evaluation.control_words import control_lines
from kgrec_jax.evaluation.ranking import RankingResult
from kgrec_jax.evaluation.render import HEADLINE, markdown
from kgrec_jax.evaluation.significance import bootstrap_cis, paired_difference
from kgrec_jax.tracking import to_json, write_json, write_text

FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Report:
    """All figures of a run. Field order is the order in report.json."""

    name: str  # of the data set
    split: str  # kind of split
    fit_on: str  # "train" or "train+valid": what the measured models were fitted on
    history: str  # the parts that counted as the users' history when the test was ranked
    candidates: int
    users: int
    models: dict[str, dict[str, Any]]  # see `model_entry`
    paired: dict[str, dict[str, dict[str, float | None]]]  # model -> metric -> reference minus model, standard error
    reference: str  # the model that `paired` compares with the others
    link_prediction: dict[str, Any]
    timing: dict[str, float]  # stage -> seconds
    skipped: dict[str, str]  # model or stage -> reason
    example: dict[str, Any]  # {"user", "history": [title], "recommendations": [{"title", "score", "reason", …}]}
    notes: tuple[str, ...] = ()
    controls: dict[str, Any] | str = "not run"  # what each source is worth, see `controls.summarise`

    def to_json(self) -> dict[str, Any]:
        """What report.json holds."""
        return to_json({"format_version": FORMAT_VERSION, **dataclasses.asdict(self)})


def model_entry(result: RankingResult, seed: int) -> dict[str, Any]:
    """{metric: mean, "ci95": {metric: [low, high]}, "users", "candidates", "warm": {…}, "cold": {…}, "buckets": {…}}.

    `warm` and `cold` have the same fields and are absent where nobody has anything to find there.
    """
    entry: dict[str, Any] = result.means()
    entry["ci95"] = bootstrap_cis(result.per_user, seed)
    entry |= {"users": len(result.users), "candidates": result.num_candidates}
    for side, part in (("warm", result.warm), ("cold", result.cold)):
        if part is not None:
            entry[side] = model_entry(dataclasses.replace(part, warm=None, cold=None, buckets={}), seed)
    if result.buckets:
        entry["buckets"] = result.buckets
    return entry


def make_report(
    results: Mapping[str, RankingResult],
    *,
    name: str,
    split: str,
    fit_on: str,
    history: str,
    seed: int,
    reference: str,
    link_prediction: dict[str, Any],
    timing: dict[str, float],
    skipped: dict[str, str],
    example: dict[str, Any],
    notes: tuple[str, ...] = (),
) -> Report:
    """The report on models that ranked the same candidates for the same users; `reference` is one of them."""
    first = results[reference]
    paired: dict[str, dict[str, dict[str, float | None]]] = {}
    for other, result in results.items():
        if other != reference:
            paired[other] = {}
            for metric in (m for m in HEADLINE if m in first.per_user):
                mean, error = paired_difference(first.per_user[metric], result.per_user[metric])
                paired[other][metric] = {"difference": mean, "standard_error": error if math.isfinite(error) else None}
    return Report(
        name=name, split=split, fit_on=fit_on, history=history,
        candidates=first.num_candidates, users=len(first.users),
        models={model: model_entry(result, seed) for model, result in results.items()},
        paired=paired, reference=reference,
        link_prediction=link_prediction, timing=timing, skipped=skipped, example=example, notes=notes,
    )


def write_report(report: Report, folder: Path) -> None:
    """report.json and report.md, which shows every picture in the folder's plots/."""
    write_json(folder / "report.json", report.to_json())
    plots = [f"plots/{p.name}" for p in sorted((folder / "plots").glob("*.png"))]
    write_text(folder / "report.md", markdown(report, plots, control_lines(report.controls, str(folder))))


def read_report(folder: Path) -> Report:
    """The report that `write_report` left; KgrecError where there is none, or one of another format."""
    path = folder / "report.json"
    if not path.is_file():
        raise KgrecError(f"{path}: found no report, expected one; run `kgrec evaluate {folder}` first")
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise KgrecError(
            f"{path}:{error.lineno}: found {error.msg}, expected JSON; run `kgrec evaluate {folder}` again"
        ) from None
    except UnicodeDecodeError as error:
        raise KgrecError(f"{path}: found {error.reason}, expected JSON; run `kgrec evaluate {folder}` again") from None
    version = held.pop("format_version", None) if isinstance(held, dict) else None
    if version != FORMAT_VERSION:
        raise KgrecError(
            f"{path}: found format version {version}, expected {FORMAT_VERSION}; run `kgrec evaluate {folder}` again"
        )
    fields = {field.name for field in dataclasses.fields(Report)}
    if held.keys() != fields:
        wrong = ", ".join(sorted(held.keys() ^ fields))
        raise KgrecError(f"{path}: found a report that differs in {wrong}, expected what kgrec wrote; run "
                         f"`kgrec evaluate {folder}` again")
    return Report(**held | {"notes": tuple(held["notes"])})
