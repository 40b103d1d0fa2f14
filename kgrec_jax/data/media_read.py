"""Images and sounds as arrays of one shape, decoded once and kept in the cache.

A file is read by its content: a WebP image that is called .jpg is read all the same, but what is none of the formats
that a folder may hold, empty, cut short or damaged is an error with its path.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import math
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np

from kgrec_jax.data.media_files import MediaFiles
from kgrec_jax.data.media_mel import log_mel, resampled, samples_of
from kgrec_jax.data.sources import cache_root
from kgrec_jax.errors import KgrecError

_VERSION = 1  # of what `read` makes of a file
PART = 512  # items of one file of the cache, which is what a broken-off reading loses at most
_FORMATS = {"image": ("JPEG", "PNG", "WEBP"), "sound": ("WAV", "WAVEX", "RF64", "FLAC", "OGG")}


@dataclasses.dataclass(frozen=True)
class ImageForm:
    """Images as [S, S, 3] uint8: upright, resized and cut to the middle square."""

    kind: ClassVar[str] = "image"
    size: int  # S, pixels

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one array."""
        return self.size, self.size, 3

    def read(self, path: pathlib.Path) -> np.ndarray:
        """[S, S, 3] uint8; transparent pixels are white. KgrecError with the path for a file that is no whole image."""
        pil = _pillow()
        try:
            with pil.Image.open(path, formats=_FORMATS["image"]) as image:
                image.draft("RGB", (2 * self.size, 2 * self.size))  # a JPEG is decoded no larger than that needs
                upright = pil.ImageOps.exif_transpose(image)
                square = pil.ImageOps.fit(_in_rgb(pil, upright), (self.size, self.size), pil.Image.Resampling.BICUBIC)
                return np.asarray(square, np.uint8)
        except (OSError, SyntaxError, ValueError, EOFError, pil.Image.DecompressionBombError) as error:
            reason = "an empty file" if path.stat().st_size == 0 else f"no whole image ({_first_line(error)})"
            raise KgrecError(f"{path}: found {reason}, expected JPEG, PNG or WebP; replace or remove it") from None


@dataclasses.dataclass(frozen=True)
class SoundForm:
    """Sounds as log-mel spectrograms [frames, mels, 1] float32 of the middle seconds, both channels as one."""

    kind: ClassVar[str] = "sound"
    rate: int  # Hz that sounds are resampled to
    frames: int  # 50 a second
    mels: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one array."""
        return self.frames, self.mels, 1

    def read(self, path: pathlib.Path) -> np.ndarray:
        """[frames, mels, 1] float32; KgrecError with the path for a file that is no whole sound.

        A WAV file that is cut short is found by its header, a FLAC file where the cut is in what is read; an Ogg file
        does not say how long it was.
        """
        soundfile = _soundfile()
        problem = "an empty file" if path.stat().st_size == 0 else _cut_short(path)
        try:
            with soundfile.SoundFile(path) as file:
                if file.format not in _FORMATS["sound"]:
                    raise ValueError(f"its format is {file.format}")
                total = file.frames
                wanted = math.ceil(samples_of(self.frames, self.rate) * file.samplerate / self.rate)
                start = max((total - wanted) // 2, 0)
                file.seek(start)
                found = file.read(wanted, dtype="float32", always_2d=True)  # [T, channels]
                rate = file.samplerate
        except (RuntimeError, OSError, ValueError) as error:  # soundfile's own errors are RuntimeErrors
            problem = problem or f"no whole sound ({_first_line(error)})"
        else:
            if not total:
                problem = problem or "a sound of no samples"
            elif len(found) < min(wanted, total):
                problem = problem or f"a sound that is cut short: {len(found):,} of {min(wanted, total):,} samples"
            elif not np.isfinite(found).all():
                problem = problem or "NaN or infinity among the samples"
        if problem:
            raise KgrecError(f"{path}: found {problem}, expected WAV, FLAC or Ogg; replace or remove it")
        signal = resampled(found.mean(1), rate, self.rate)[:samples_of(self.frames, self.rate)]
        return log_mel(signal, self.rate, self.mels, self.frames)[..., None]


Form = ImageForm | SoundForm


@dataclasses.dataclass(frozen=True)
class Arrays:
    """Arrays of many items, mapped from the cache: what is not touched is not in memory."""

    parts: tuple[np.ndarray, ...]  # [PART, …] each, the last one shorter

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def take(self, index: np.ndarray) -> np.ndarray:
        """[len(index), …] in the order of `index`."""
        index = np.asarray(index)
        out = np.empty((len(index), *self.parts[0].shape[1:]), self.parts[0].dtype)
        for part in np.unique(index // PART):
            here = index // PART == part
            out[here] = self.parts[part][index[here] - part * PART]
        return out


def check_extra(kind: str) -> None:
    """KgrecError naming the extra where the package that decodes such files is not installed."""
    _pillow() if kind == "image" else _soundfile()


def read_arrays(files: MediaFiles, form: Form, advance: Callable[[int], None] = lambda count: None) -> Arrays:
    """The arrays of all items with a file, in the order of `files.rows`.

    They are kept in `cache_root()/media`, some hundred a file: a reading that is broken off goes on where it was, and
    every further run over the same files maps them. `advance` is told how many more are there.
    """
    key = hashlib.sha256(f"{_VERSION} {files.digest} {form}".encode()).hexdigest()[:24]
    folder = cache_root() / "media" / key
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for number, first in enumerate(range(0, len(files.rows), PART)):
        rows, path = files.rows[first:first + PART], folder / f"{number:05}.npy"
        held = _mapped(path, (len(rows), *form.shape))
        if held is None:
            temporary = path.with_name(f".{path.stem}.{os.getpid()}.npy")
            np.save(temporary, np.stack(list(decoded([files.paths[r] for r in rows], form, advance))))
            os.replace(temporary, path)
            held = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            advance(len(rows))
        parts.append(held)
    return Arrays(tuple(parts))


def decoded(paths: list[pathlib.Path], form: Form, advance: Callable[[int], None] = lambda count: None,
            ) -> Iterator[np.ndarray]:
    """The array of each file, in order; several are decoded at a time, which happens outside of Python's lock."""
    with concurrent.futures.ThreadPoolExecutor(max_workers=max(os.cpu_count() or 1, 1)) as pool:
        try:
            for array in pool.map(form.read, paths):
                advance(1)
                yield array
        except KgrecError:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _mapped(path: pathlib.Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """A part of the cache, None where it is not there or not whole."""
    try:
        held = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return held if held.shape == shape else None


def _in_rgb(pil: Any, image: Any) -> Any:
    if image.mode.startswith("I;16"):  # sixteen bits of grey, which Pillow would cut at 255
        return pil.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = pil.Image.new("RGBA", image.size, (255, 255, 255, 255))
        return pil.Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _cut_short(path: pathlib.Path) -> str:
    """What a RIFF header says against the file's size; libsndfile reads what is left and says nothing."""
    with open(path, "rb") as file:
        head = file.read(12)
    if head[:4] != b"RIFF" or head[8:] != b"WAVE":
        return ""
    told, size = int.from_bytes(head[4:8], "little") + 8, path.stat().st_size
    streamed = told - 8 in (0, 0xFFFFFFFF)  # its writer did not know the length
    return "" if streamed or told <= size else f"a sound that is cut short: {size:,} of {told:,} bytes"


def _first_line(error: Exception) -> str:
    text = str(error).replace("\n", " ").strip()
    return text.split(": ", 1)[-1][:120] or type(error).__name__


def _pillow() -> Any:
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError:
        raise KgrecError(_missing("Pillow", "images")) from None
    return PIL


def _soundfile() -> Any:
    try:
        import soundfile
    except (ImportError, OSError):  # OSError: the package is there and its library is not
        raise KgrecError(_missing("soundfile", "sounds")) from None
    return soundfile


def _missing(package: str, what: str) -> str:
    return (f"media: found no {package}, which reads {what}, expected the extra `media`; pip install "
            "'kgrec-jax[media]', or set fuse.media.mode to off")
