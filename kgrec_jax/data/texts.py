"""One text out of several columns, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# These say by themselves what they are; any other column is introduced by its name ("genres: Drama, War").
_PLAIN = ("title", "name", "description", "text", "abstract", "summary", "overview", "body", "llm_text")
_STOPS = ".!?…。！？"


def separator(text: str) -> str:
    """What stands between a text and the next one; Chinese and Japanese have a full stop of their own."""
    last = text[-1:]
    if last in _STOPS:
        return " "
    return "。" if "\u3040" <= last <= "\u9fff" else ". "


def join_columns(columns: Mapping[str, Sequence[str]], num_rows: int) -> list[str]:
    """[num_rows] the non-empty values of each row as one text, in the order of the columns; "" where all are empty."""
    texts = [""] * num_rows
    for name, values in columns.items():
        label = "" if name in _PLAIN else name.replace("_", " ") + ": "
        for row, value in enumerate(values):
            value = value.strip()
            if value:
                before = texts[row]
                texts[row] = f"{before}{separator(before)}{label}{value}" if before else label + value
    return texts


def split_title(name: str, text: str) -> str | None:
    """The rest of a text that begins with `name` as `join_columns` puts it; None where it does not begin so."""
    if text == name:
        return ""
    start = name + separator(name)
    rest = text[len(start):]
    return rest if name and text.startswith(start) and rest.strip() == rest else None
