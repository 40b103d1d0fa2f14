"""Where hyper-parameters are searched: a table of fields and ranges, and a config with other values in them."""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from kgrec_jax.config import Experiment, Field, fields_of
from kgrec_jax.errors import KgrecError

Value = int | float | str


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from low to high, both included."""

    low: float
    high: float
    log: bool = False  # drawn by their logarithm: what matters is the ratio
    step: float = 0.0  # between two neighbours; 0: any number (whole numbers: 1)

    def __str__(self) -> str:
        more = ":log" if self.log else f":{self.step:g}" if self.step else ""
        return f"{self.low:g}..{self.high:g}{more}"


@dataclasses.dataclass(frozen=True)
class Choices:
    """A few values."""

    values: tuple[Value, ...]

    def __str__(self) -> str:
        return ",".join(map(str, self.values))


Domain = Range | Choices

# What is searched unless --space says otherwise: the towers, how they are trained, and how free the gate is.
SPACE: dict[str, Domain] = {
    "fuse.tower.width": Range(32, 256, log=True),
    "fuse.tower.part_dropout": Range(0.0, 0.5),
    "fuse.tower.free_dropout": Range(0.0, 0.7),
    "fuse.tower.history_dropout": Range(0.0, 0.7),
    "fuse.optim.peak_lr": Range(5e-4, 2e-2, log=True),
    "fuse.optim.weight_decay": Range(1e-6, 1e-2, log=True),
    "fuse.cf_weight": Range(0.01, 1.0, log=True),
    "fuse.steps": Range(300, 2400, log=True),
    "fuse.gate.penalty": Range(1e-4, 1.0, log=True),
}
# Another value there would change what is measured, or nothing at all.
_FIXED = ("data", "mesh", "name", "seed", "fuse.eval_users")
_EXPECTED = "PATH=LOW..HIGH, PATH=LOW..HIGH:log, PATH=LOW..HIGH:STEP or PATH=VALUE,VALUE"
# Fields on which neither the texts' vectors nor the settings of the closed forms depend.
_AFTER_CHOICES = ("fuse.tower", "fuse.ensemble", "fuse.optim", "fuse.cf_weight", "fuse.steps", "fuse.batch",
                  "fuse.gate")


def parse_space(words: Sequence[str]) -> dict[str, Domain]:
    """The table of `--space` arguments; KgrecError for a field or a range that is none."""
    fields, out = fields_of(Experiment), {}
    for word in words:
        path, equals, rest = word.partition("=")
        path = path.removeprefix("--").replace("-", "_")
        field = fields.get(path)
        if not equals or not rest or not path:
            raise KgrecError(f"--space: found {word!r}, expected {_EXPECTED}")
        if field is None:
            raise KgrecError(f"--space: found the field {path!r}, expected one of the config; kgrec run CONFIG --help "
                             "lists them")
        if any(path == f or path.startswith(f + ".") for f in _FIXED) or path.endswith(("log_every", "_every")):
            raise KgrecError(f"--space: found {path}, expected a field that leaves data and measurement as they are")
        if field.many:
            raise KgrecError(f"--space: found {path}, which takes many values, expected a field with one")
        if path in out:
            raise KgrecError(f"--space: found {path} twice, expected each field once")
        out[path] = _range(field, rest) if ".." in rest else _choices(field, rest)
    return out


def _range(field: Field, words: str) -> Range:
    found = re.fullmatch(r"([^:]+?)\.\.([^:]+)(?::(.+))?", words)
    if field.kind not in (int, float):
        raise KgrecError(f"--space: found the range {words} for {field.name}, expected values of it, "
                         f"{field.expected()}")
    try:
        low, high = (field.kind(word) for word in found.groups()[:2])
        log = found[3] == "log"
        step = float(found[3]) if found[3] and not log else 0.0
    except (AttributeError, ValueError):
        raise KgrecError(f"--space: found {field.name}={words}, expected {_EXPECTED}, numbers of type "
                         f"{field.kind.__name__}") from None
    if not (math.isfinite(low) and math.isfinite(high)) or low >= high or (log and low <= 0) or step < 0 \
            or (field.kind is int and step != int(step)):
        raise KgrecError(f"--space: found {field.name}={words}, expected a low end below the high one"
                         f"{' and above 0, for its logarithm' if log else ''}")
    return Range(low, high, log, step)


def _choices(field: Field, words: str) -> Choices:
    listed = [word.strip() for word in words.split(",")]
    wrong = next((word for word in listed if not word or not field.reads(word)), None)
    if wrong is not None or len(set(listed)) < 2:
        found = f"{wrong!r}" if wrong is not None else words
        raise KgrecError(f"--space: found {found} for {field.name}, expected two or more values, {field.expected()}")
    kind = field.kind if field.kind in (int, float) else str
    if typing.get_origin(field.kind) is typing.Literal:
        by_word = {str(v): v for v in typing.get_args(field.kind)}
        return Choices(tuple(by_word[word] for word in dict.fromkeys(listed)))
    return Choices(tuple(kind(word) for word in dict.fromkeys(listed)))


def value_at(experiment: Any, path: str) -> Any:
    """The value of a field by its dotted name."""
    for name in path.split("."):
        experiment = getattr(experiment, name)
    return experiment


def with_values(config: Any, values: Mapping[str, Any]) -> Any:
    """The config with other values in the fields of dotted names."""
    changed: dict[str, Any] = {}
    below: dict[str, dict[str, Any]] = {}
    for path, value in values.items():
        name, dot, rest = path.partition(".")
        if dot:
            below.setdefault(name, {})[rest] = value
        else:
            changed[name] = value
    changed |= {name: with_values(getattr(config, name), inner) for name, inner in below.items()}
    return dataclasses.replace(config, **changed)


def corners(space: Mapping[str, Domain]) -> list[dict[str, Value]]:
    """Single changes that a config must bear before the search begins: both ends of ranges, every choice."""
    return [{path: value} for path, domain in space.items()
            for value in (domain.values if isinstance(domain, Choices) else (domain.low, domain.high))]


def shared_stages(space: Mapping[str, Domain]) -> tuple[str, ...]:
    """The stages that no field of the space has a bearing on, so that all trials can have one result of them."""
    if any(path.partition(".")[0] in ("pretrain", "encoder") for path in space):
        return ()
    return ("pretrain",) if any(path.startswith("graph.") for path in space) else ("pretrain", "graph")


def shares_choices(space: Mapping[str, Domain]) -> bool:
    """Whether texts are read and closed forms chosen once for all trials."""
    after = all(any(path == f or path.startswith(f + ".") for f in _AFTER_CHOICES) for path in space)
    return after and "fuse.gate.inner_share" not in space


def prunes(space: Mapping[str, Domain]) -> bool:
    """Whether trials are learned on one inner cut, so that what they reach there can be compared."""
    return not any(path in space for path in ("fuse.gate.inner_share", "fuse.gate.guard_share", "fuse.gate.max_users"))
