"""Raw images and sounds of items: which file of media/NAME/ belongs to which item; nothing is decoded here.

media/NAME/ holds one file an item, ITEM_ID.jpg, .jpeg, .png or .webp, or ITEM_ID.wav, .flac or .ogg: images or sounds,
not both. What an item id has that a file name cannot have is percent-encoded (`file_stem`).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import pathlib
import re
import shutil
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from kgrec_jax.errors import KgrecError

SUFFIXES = {"image": (".jpg", ".jpeg", ".png", ".webp"), "sound": (".wav", ".flac", ".ogg")}
_WHOLE, _BLOCK = 1 << 22, 1 << 18  # bytes: files up to the first are hashed whole, of larger ones such blocks


@dataclasses.dataclass(frozen=True)
class MediaFiles:
    """The files of one media/NAME/."""

    kind: Literal["image", "sound"]
    paths: tuple[pathlib.Path | None, ...]  # [I]; None where an item has no file

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """[n] int64: the items that have a file, in order."""
        return np.array([row for row, path in enumerate(self.paths) if path is not None], np.int64)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of which item has which content, not of where it lies.

        Of a file above 4 MiB its size and its first, middle and last 256 KiB stand for it: hours of music would take
        minutes to hash at the start of every command.
        """
        digest = hashlib.sha256(f"{self.kind} {len(self.paths)}".encode())
        for row in self.rows.tolist():
            digest.update(f"\x00{row}\x00".encode() + _of_file(self.paths[row]))
        return digest.hexdigest()


def _of_file(path: pathlib.Path) -> bytes:
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size <= _WHOLE:
                return hashlib.file_digest(file, "sha256").digest()
            digest = hashlib.sha256(str(size).encode())
            for start in (0, (size - _BLOCK) // 2, size - _BLOCK):
                file.seek(start)
                digest.update(file.read(_BLOCK))
            return digest.digest()
    except OSError as error:
        raise KgrecError(f"{path}: found a file that cannot be read ({error.strerror}), expected an image or a sound; "
                         "change its permissions or remove it") from None


def file_stem(item_id: str) -> str:
    """The name of an item's file without its suffix: the id, percent-encoded where it could be no file name."""
    return re.sub(r'[\x00-\x1f/\\:*?"<>|%]|^\.', lambda found: f"%{ord(found[0]):02X}", item_id)


def find_media_files(folder: pathlib.Path, items: Mapping[str, int]) -> tuple[dict[str, MediaFiles], list[str]]:
    """({name: files} of the folders media/NAME/, notes on those that are empty). Hidden files are passed over.

    Raises KgrecError for a file of no known item or of another format, two of one item, images among sounds.
    """
    media, notes = {}, []
    for below in sorted(p for p in (folder / "media").glob("*") if p.is_dir() and not p.name.startswith(".")):
        found = _files_of(below, items)
        if found is None:
            notes.append(f"media/{below.name}: empty, not used")
        else:
            media[below.name] = found
    return media, notes


def _files_of(below: pathlib.Path, items: Mapping[str, int]) -> MediaFiles | None:
    paths: list[pathlib.Path | None] = [None] * len(items)
    kinds: dict[str, pathlib.Path] = {}
    expected = f"expected ITEM_ID with one of {', '.join((*SUFFIXES['image'], *SUFFIXES['sound']))}"
    for path in sorted(p for p in below.iterdir() if not p.name.startswith(".")):
        kind = next((kind for kind, suffixes in SUFFIXES.items() if path.suffix.lower() in suffixes), None)
        if kind is None or not path.is_file():
            what = "a folder" if path.is_dir() else "a file of another format"
            raise KgrecError(f"{path}: found {what}, {expected}; remove it")
        other = next((p for k, p in kinds.items() if k != kind), None)
        if other is not None:
            raise KgrecError(f"{path}: found a {kind} beside {other.name}, expected images or sounds, not both; give "
                             "each kind a folder of its own in media/")
        item = urllib.parse.unquote(path.stem)
        if item not in items:
            raise KgrecError(f"{path}: found a file of {item!r}, expected one of an item of the data set; remove it, "
                             "or percent-encode its name where the id has characters like / or %")
        before = paths[items[item]]
        if before is not None:
            raise KgrecError(f"{path}: found a second file of the item {item!r} beside {before.name}, expected one; "
                             "remove one of them")
        paths[items[item]] = path
        kinds[kind] = path
    return MediaFiles(next(iter(kinds)), tuple(paths)) if kinds else None


def write_media_files(media: Mapping[str, MediaFiles], item_ids: Sequence[str], folder: pathlib.Path) -> None:
    """Copies the files into folder/media/NAME/, so that `find_media_files` finds them."""
    for name, files in media.items():
        below = folder / "media" / name
        below.mkdir(parents=True)
        for row in files.rows.tolist():
            shutil.copyfile(files.paths[row], below / f"{file_stem(item_ids[row])}{files.paths[row].suffix}")
