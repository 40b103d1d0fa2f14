"""Whether something can be done with the fields of a stage's config, said before any of it is done."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from kgrec_jax.errors import KgrecError
from kgrec_jax.optim import make_optimizer


def check_bounds(stage: str, cfg: Any, bounds: Mapping[str, tuple[float, float]]) -> None:
    """KgrecError naming the first field that is outside its bounds (lowest, highest); a field may be dotted."""
    for name, (low, high) in bounds.items():
        value = _field(cfg, name)
        if not low <= value <= high:
            raise KgrecError(f"{stage}.{name}: found {value}, expected {low} to {high}; change {stage}.{name}")


def check_optimizers(stage: str, cfg: Any, names: Sequence[str]) -> None:
    """The same for the optimisers of a config, by the name that each has there."""
    for name in names:
        try:
            make_optimizer(_field(cfg, name), 1)
        except KgrecError as error:
            raise KgrecError(str(error).replace("optim.", f"{stage}.{name}.", 1)) from None


def _field(cfg: Any, name: str) -> Any:
    return functools.reduce(getattr, name.split("."), cfg)
