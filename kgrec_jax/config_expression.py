"""A config as the Python file that makes it."""

from __future__ import annotations

import dataclasses
from typing import Any

from kgrec_jax.config import Experiment

_WIDTH = 120


def config_file(experiment: Experiment, about: str) -> str:
    """The text of a file with get_config(), one constructor expression of what differs from the defaults.

    about: its first line. `load_config` of the file gives the same experiment.
    """
    imports: set[tuple[str, str]] = set()
    expression = _expression(experiment, imports, 4)
    lines = [f"from {module} import {name}" for module, name in sorted(imports)]
    return f'"""{about}"""\n\n' + "\n".join(lines) + f"\n\n\ndef get_config() -> Experiment:\n    return {expression}\n"


def _expression(value: Any, imports: set[tuple[str, str]], indent: int) -> str:
    if not dataclasses.is_dataclass(value):
        return repr(value)
    cls = type(value)
    package, _, module = cls.__module__.rpartition(".")
    several = cls.__name__ == "Config"  # a stage's, which its module names
    imports.add((package, module) if several else (cls.__module__, cls.__name__))
    name = f"{module}.{cls.__name__}" if several else cls.__name__
    arguments = [f"{f.name}={_expression(getattr(value, f.name), imports, indent + 4)}"
                 for f in dataclasses.fields(cls) if getattr(value, f.name) != f.default]
    flat = f"{name}({', '.join(arguments)})"
    if len(flat) + indent + 12 <= _WIDTH and "\n" not in flat:
        return flat
    pad = " " * (indent + 4)
    return f"{name}(\n" + ",\n".join(pad + a for a in arguments) + ")"
