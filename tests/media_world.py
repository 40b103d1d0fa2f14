"""A world in which nothing but an image or a sound tells who touches an item, and the writers of its files."""

import pathlib

import numpy as np
import pytest

from kgrec_jax.data.tables import write_tsv

CLASSES = 4
_COLOURS = ((220, 40, 40), (40, 180, 60), (50, 80, 220), (220, 200, 40))
RATE = 8_000


def classes_of(num_items: int) -> np.ndarray:
    """[I] the class of each item."""
    return np.random.default_rng(5).permutation(np.arange(num_items) % CLASSES)


def draw_image(kind: int, seed: int) -> np.ndarray:
    """[48, 64, 3] uint8: a shape of the class's colour somewhere on noise."""
    rng = np.random.default_rng((seed, 1))
    out = rng.integers(0, 90, (48, 64, 3))
    top, left, size = rng.integers(4, 20), rng.integers(12, 28), rng.integers(16, 24)
    inside = np.zeros((48, 64), bool)
    rows, columns = np.mgrid[:48, :64]
    if kind % 2:
        inside = (rows >= top) & (rows < top + size) & (columns >= left) & (columns < left + size)
    else:
        inside = (rows - top - size / 2) ** 2 + (columns - left - size / 2) ** 2 < (size / 2) ** 2
    out[inside] = np.array(_COLOURS[kind]) + rng.integers(-30, 31, 3)
    return np.clip(out, 0, 255).astype(np.uint8)


def draw_sound(kind: int, seed: int, seconds: float = 1.2) -> np.ndarray:
    """[T] float32 at RATE: a tone of about the class's pitch in noise."""
    rng = np.random.default_rng((seed, 2))
    time = np.arange(int(seconds * RATE)) / RATE
    pitch = 250.0 * 1.8 ** kind * rng.uniform(0.95, 1.05)
    tone = 0.5 * np.sin(2 * np.pi * pitch * time + rng.uniform(0, 6))
    return (tone + rng.normal(0, 0.05, len(time))).astype(np.float32)


def write_world(folder: pathlib.Path, num_items: int = 120, num_users: int = 150, cold: int = 24, images: bool = True,
                sounds: bool = False) -> np.ndarray:
    """A dataset folder with files and neither texts nor graph; the classes [I]. The last `cold` items are in the test
    alone, the others in training."""
    Image = pytest.importorskip("PIL.Image", reason="needs the extra media")
    soundfile = pytest.importorskip("soundfile", reason="needs the extra media")
    rng, kinds = np.random.default_rng(0), classes_of(num_items)
    fond = rng.integers(0, CLASSES, num_users)
    ids = [f"item {n}/{'ä' if n % 2 else 'b'}" for n in range(num_items)]
    rows = {"train": ([], []), "test": ([], [])}
    for user in range(num_users):
        chance = np.where(kinds == fond[user], 0.35, 0.02)
        for item in np.flatnonzero(rng.random(num_items) < chance).tolist():
            users, items = rows["test" if item >= num_items - cold else "train"]
            users.append(f"u{user}")
            items.append(ids[item])
    folder.mkdir(parents=True)
    for part, (users, items) in rows.items():
        write_tsv(folder / f"{part}.tsv", {"user_id": users, "item_id": items})
    write_tsv(folder / "items.tsv", {"item_id": ids})
    for name, there in (("cover", images), ("clip", sounds)):
        (folder / "media" / name).mkdir(parents=True) if there else None
    for item in range(num_items):
        stem = ids[item].replace("/", "%2F")
        if images:
            suffix = (".png", ".jpg", ".webp")[item % 3]
            Image.fromarray(draw_image(kinds[item], item)).save(folder / "media" / "cover" / f"{stem}{suffix}")
        if sounds:
            suffix = (".wav", ".flac", ".ogg")[item % 3]
            soundfile.write(folder / "media" / "clip" / f"{stem}{suffix}", draw_sound(kinds[item], item), RATE)
    return kinds
