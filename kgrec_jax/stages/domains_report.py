"""What several domains in one run were worth, in words: a section for each, beside the domain alone."""

from __future__ import annotations

from typing import Any

from kgrec_jax.stages.domains_judge import METRICS, VIEWS

_TITLES = {"ndcg@10": "NDCG@10", "recall@20": "Recall@20"}
_SAID = {"towers": "shared towers − the same towers on this domain alone",
         "fused": "fused score with the part `domains` − with the part of those towers",
         "own towers": "shared towers − own towers, the same steps and users a step",
         "fused alone": "fused score with the part `domains` − without"}
_CONTROL = ("The control is the shared towers and heads trained on this domain alone, on tables of its own graph, with "
            "the same users in as many steps and a gate learned in the same way: what differs is the other domains. "
            "Own towers are of another architecture, and the fused score without the part has one part less.")
_NO_CONTROL = ("The control, the same towers trained on this domain alone, was not run (domains.control): the "
               "differences are also those of another architecture and of one part more.")


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    shared = report["shared"]
    out = ["# " + ", ".join(report["domains"]), "",
           f"Heads: {shared['heads']['kind']}. Steps: {shared['steps']:,}, in each {shared['users_a_step']} users of "
           "every domain; a domain's own towers were trained for as many.", "", *shared["notes"], ""]
    for name, found in report["domains"].items():
        told = _CONTROL if "towers" in found["paired"] else _NO_CONTROL
        out += [f"## {name}", "", f"{found['users']:,} users, {found['items']:,} items, {found['interactions']:,} "
                f"interactions, split {found['split']}.", "", *found["notes"], "", *_models(found), "",
                *_paired(found), "", told, "", _gate(found), ""]
    return "\n".join(out)


def lines(report: dict[str, Any]) -> list[str]:
    """The paired differences for a terminal, a line each."""
    out = []
    for name, found in report["domains"].items():
        for pair, by in found["paired"].items():
            said = [f"{view} {_difference(by[view]['ndcg@10'])}" for view in _views(found)]
            out.append(f"{name}: {_SAID[pair]}: NDCG@10 {', '.join(said)}")
    return out


def _views(found: dict[str, Any]) -> list[str]:
    return [view for view in VIEWS if view in next(iter(found["models"].values()))]


def _models(found: dict[str, Any]) -> list[str]:
    views = _views(found)
    heads = [f"{_TITLES[m]} {view}" for view in views for m in METRICS]
    rows = [f"| {name} | " + " | ".join(f"{by[view][m]:.4f}" for view in views for m in METRICS) + " |"
            for name, by in found["models"].items()]
    return ["| model | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|", *rows]


def _paired(found: dict[str, Any]) -> list[str]:
    views = _views(found)
    heads = [f"{_TITLES[m]} {view}" for view in views for m in METRICS]
    rows = [f"| {_SAID[pair]} | " + " | ".join(_difference(by[view][m]) for view in views for m in METRICS) + " |"
            for pair, by in found["paired"].items()]
    return ["| difference ± standard error over users | " + " | ".join(heads) + " |",
            "|---" * (len(heads) + 1) + "|", *rows]


def _difference(told: dict[str, float | None]) -> str:
    error = told["standard_error"]
    return f"{told['difference']:+.4f}" + (f" ± {error:.4f}" if error is not None else "")


def _gate(found: dict[str, Any]) -> str:
    weights = found["gate"]["weights"]
    said = ", ".join(f"{name} {weight:.2f}" for name, weight in sorted(weights.items(), key=lambda w: -w[1]))
    guard = "".join(f" Among {side} items on held-out users: fused {told['fused']:.4f}, best part {told['best']} "
                    f"{told['value']:.4f}; {told['kept']} orders them."
                    for side, told in found["gate"]["guard"].items())
    return f"Weights of the parts for warm items: {said}.{guard}"
