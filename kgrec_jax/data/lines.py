"""Text files line by line: UTF-8 with or without a BOM, LF or CRLF."""

from __future__ import annotations

import pathlib

from kgrec_jax.errors import KgrecError


def encoding_error(path: pathlib.Path, line: int) -> KgrecError:
    """What to say of bytes on a line that are not UTF-8."""
    return KgrecError(f"{path}:{line}: found bytes that are not UTF-8, expected UTF-8; convert it, for instance: "
                      f"iconv -f LATIN1 -t UTF-8 {path.name}")


def read_lines(path: pathlib.Path) -> list[str]:
    """The lines of a file without their ends, a last one that is empty included; KgrecError where it is not UTF-8."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise encoding_error(path, data[:error.start].count(b"\n") + 1) from None
    return [line.removesuffix("\r") for line in text.split("\n")]
