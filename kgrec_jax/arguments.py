"""Arguments of the command line, with errors of one line. It imports neither JAX nor tyro."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Collection, Sequence

from kgrec_jax.errors import KgrecError


def take(argv: list[str], flag: str, expected: str = "the folder of the run") -> tuple[list[str], str]:
    """The other arguments, and the value of a flag that is no field of the config."""
    rest, value = [], ""
    words = iter(argv)
    for word in words:
        if word != flag and not word.startswith(flag + "="):
            rest.append(word)
            continue
        value = next(words, "") if word == flag else word[len(flag) + 1:]
        if not value or value.startswith("--"):
            raise KgrecError(f"{flag}: found no value, expected {expected}")
    return rest, value


class Parser(argparse.ArgumentParser):
    """argparse with the project's errors: one line, FIELD: found …, expected …."""

    def __init__(self, name: str, description: str):
        super().__init__(prog=f"kgrec {name}", description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> None:
        """Raises KgrecError for what argparse found."""
        patterns = (
            (r"argument ([^:]+): invalid choice: (.*) \(choose from (.*)\)", r"\1: found \2, expected one of \3"),
            (r"argument ([^:]+): expected (.*)", r"\1: found no value, expected \2"),
            (r"argument ([^:]+): (found .*)", r"\1: \2"),
            (r"the following arguments are required: (.*)", r"\1: found none, expected it"),
            (r"unrecognized arguments: (\S+).*", r"\1: unknown argument, expected those of the command"))
        for pattern, words in patterns:
            if re.fullmatch(pattern, message):
                message = re.sub(pattern, words, message)
                break
        raise KgrecError(f"{message}; see {self.prog} --help")


def positive(word: str) -> int:
    """A whole number of at least 1, as the type of an argument."""
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"found {word!r}, expected a whole number of at least 1")
    return int(word)


def share(word: str) -> float:
    """A number from 0 to 1, as the type of an argument."""
    value = _number(word)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"found {word!r}, expected a share from 0 to 1")
    return value


def share_below_one(word: str) -> float:
    """A number from 0 to below 1, as the type of an argument."""
    value = _number(word)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"found {word!r}, expected a number from 0 to below 1")
    return value


def _number(word: str) -> float:
    """The number, and what is none as not a number, which is within no bounds."""
    try:
        return float(word)
    except ValueError:
        return math.nan


def split_flags(argv: Sequence[str], flags: Collection[str]) -> tuple[list[str], list[str]]:
    """(the `flags` with their values, all other words: a config and its fields) of a command that has both."""
    own: list[str] = []
    rest: list[str] = []
    into = rest
    for word in argv:
        flag = word.partition("=")[0]
        if flag.startswith("--"):
            into = own if flag in flags else rest
        into.append(word)
    return own, rest
