"""Towers on raw images and sounds: they learn to tell an item's place among what people choose from its file alone.

After van den Oord et al. (2013), deep content-based music recommendation: the targets are the items' collaborative
factors (iALS), the loss is a cosine or squared error to them, or InfoNCE within the batch. The vectors are a block of
features like any media/NAME.npy.

Factors and towers see the interactions of the *inner cut's* fit part alone (`fuse_cut.inner_cut`), and the vectors
stay as they are when all other parts are fitted again on more. The gate learns what to trust from interactions that
no part has seen; a vector that was trained to say who touches an item would be trusted there for what it had been
told. For the same reason neither validation nor test can be in it. The ridge over the vectors has the same difficulty
with the items that a tower learned from: their vectors are better than those of cold items ever will be. So there are
`folds` towers, each without a share of the items: an item that was learned from gets its vector from the tower that
did not see it, and any other item their mean. All of them are in the space of the factors, so they can be mixed.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import zlib
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from kgrec_jax import checkpoint, train
from kgrec_jax.data.dataset import Dataset, Interactions
from kgrec_jax.data.media_batches import MediaBatch, MediaBatches
from kgrec_jax.data.media_files import MediaFiles
from kgrec_jax.data.media_mel import FRAMES_PER_SECOND
from kgrec_jax.data.media_read import Arrays, Form, ImageForm, SoundForm, check_extra, read_arrays
from kgrec_jax.errors import KgrecError
from kgrec_jax.linear.ials import Settings, ials
from kgrec_jax.linear.parts import FoldIn
from kgrec_jax.models.media_towers import MediaTower, MediaTowerConfig, TrainedMedia
from kgrec_jax.optim import OptimConfig, make_optimizer
from kgrec_jax.sharding import REPLICATED, Rules
from kgrec_jax.tracking import NPZ_ERRORS, write_npz

MEDIA_RULES: Rules = REPLICATED  # the towers are small: every device has them whole
MIN_ITEMS = 20  # touched items with a file, below which nothing is learned
_BLOCK = 256  # items that are read by the towers at a time
# What the fields of fuse.Config.media may be.
MEDIA_BOUNDS = {
    "image_size": (8, 1024), "sound_rate": (8_000, 192_000), "sound_seconds": (0.1, 3600.0), "sound_mels": (4, 128),
    "image_patch": (2, 256), "sound_patch": (2, 128), "width": (1, 4096), "layers": (1, 64), "heads": (1, 256),
    "dropout": (0.0, 0.99), "factors": (1, 4096), "folds": (1, 20), "temperature": (1e-4, 1e4), "steps": (0, 1 << 30),
    "batch": (2, 1 << 20)}


@dataclasses.dataclass(frozen=True)
class MediaConfig:
    """How raw images and sounds are read and what is learned from them."""

    mode: Literal["off", "auto"] = "auto"  # auto: where the data set has raw files
    image_size: int = 64  # pixels of the square that an image is resized and cut to
    image_patch: int = 8  # pixels of a patch's side
    sound_rate: int = 16_000  # Hz that sounds are resampled to
    sound_seconds: float = 4.0  # from the middle of a sound
    sound_mels: int = 64  # bands of the log-mel spectrogram
    sound_patch: int = 16  # bands, and frames of 20 ms, of a patch
    width: int = 64  # of the Transformer over patches
    layers: int = 2
    heads: int = 4
    dropout: float = 0.1  # of hidden units
    factors: int = 32  # of the items, which are to be told; width of the vectors
    folds: int = 3  # towers, each without that share of the items; 1: one tower, which saw the items it speaks of
    loss: Literal["cosine", "mse", "infonce"] = "cosine"  # of the tower's vector and the item's factors
    temperature: float = 0.1  # infonce: of the softmax over cosines
    steps: int = 0  # of each tower; 0: forty passes over the items, 300 to 1200
    batch: int = 64  # items of a step
    optim: OptimConfig = OptimConfig(peak_lr=1e-3, weight_decay=0.05)

    def form(self, kind: str) -> Form:
        """What files of a kind become."""
        if kind == "image":
            return ImageForm(self.image_size)
        return SoundForm(self.sound_rate, round(self.sound_seconds * FRAMES_PER_SECOND), self.sound_mels)

    def tower(self, kind: str) -> MediaTowerConfig:
        """The tower of a kind."""
        patch = self.image_patch if kind == "image" else self.sound_patch
        return MediaTowerConfig(patch, self.width, self.layers, self.heads, self.dropout, self.factors)

    def step_flops(self, kind: str) -> float:
        """About the floating-point operations of a training step of a kind: six for each weight and patch."""
        (high, wide, _), patch = self.form(kind).shape, self.tower(kind).patch
        return 72.0 * self.width**2 * self.layers * self.batch * (high // patch) * (wide // patch)

    def num_steps(self, num_items: int) -> int:
        """Steps of a tower that learns from so many items."""
        return self.steps or int(np.clip(40 * num_items // self.batch, 300, 1200))


def loss(cfg: MediaConfig, model: MediaTower, params: Any, constants: Any, batch: MediaBatch,
         key: jax.Array) -> tuple[jax.Array, dict]:
    """Mean over the batch's items of how far the tower's vectors are from the targets; their cosine beside it.

    infonce: each item's vector has to find its own factors among those of the batch, and the factors their item.
    """
    del constants
    found = model.apply({"params": params}, batch.values, False, rngs={"dropout": key})  # [B, F]
    unit, wanted = _unit(found), _unit(batch.targets)
    cosine = (unit * wanted).sum(-1)  # [B]
    if cfg.loss == "cosine":
        each = 1.0 - cosine
    elif cfg.loss == "mse":
        each = jnp.square(found - batch.targets).mean(-1)
    else:
        logits = unit @ wanted.T / cfg.temperature  # [B, B]
        real = batch.weights > 0
        logits = jnp.where(real[None, :] & real[:, None], logits, -1e9)
        own = jnp.diagonal(logits)
        each = 0.5 * (jax.nn.logsumexp(logits, 0) + jax.nn.logsumexp(logits, 1)) - own
    count = batch.weights.sum()
    return (each * batch.weights).sum() / jnp.maximum(count, 1.0), {"cosine": ((cosine * batch.weights).sum(), count)}


def _unit(rows: jax.Array) -> jax.Array:
    return rows / jnp.sqrt(jnp.maximum(jnp.square(rows).sum(-1, keepdims=True), 1e-12))


def check(cfg: MediaConfig) -> None:
    """KgrecError for fields that are each within their bounds and do not go together."""
    pairs = (("image_patch", cfg.image_patch, "image_size", cfg.image_size),
             ("sound_patch", cfg.sound_patch, "sound_mels", cfg.sound_mels), ("heads", cfg.heads, "width", cfg.width))
    for name, value, other, whole in pairs:
        if whole % value:
            raise KgrecError(f"fuse.media.{name}: found {value}, expected a divisor of fuse.media.{other} {whole}; "
                             "change one of them")
    if cfg.form("sound").frames < cfg.sound_patch:
        raise KgrecError(f"fuse.media.sound_seconds: found {cfg.sound_seconds}, expected at least the "
                         f"{cfg.sound_patch / FRAMES_PER_SECOND} of a patch; change it or fuse.media.sound_patch")


def check_data(cfg: MediaConfig, data: Dataset) -> None:
    """KgrecError where the data set has raw files and the package that reads them is not installed."""
    for files in data.raw_media.values() if cfg.mode != "off" else ():
        check_extra(files.kind)


def learn(experiment: Any, run: Any, log: Interactions) -> None:
    """Leaves vectors and towers of each media/NAME/ in the stage's folder, for `media_blocks` and `trained_media`.

    `log`: the inner cut's fit part. What is there already is not learned again; what was broken off goes on.
    """
    cfg, data, below = experiment.fuse.media, run.dataset, run.stage("fuse") / "media"
    left = {name: files for name, files in data.raw_media.items() if not (below / name / "vectors.npz").is_file()}
    if cfg.mode == "off" or not left:
        return
    touched = np.bincount(log.item, minlength=data.num_items) > 0
    factors = None
    for name, files in left.items():
        count = int(touched[files.rows].sum())
        if count < MIN_ITEMS:
            run.tracker.say(f"media {name}: {count} items with a file are touched in what it may learn from, expected "
                            f"{MIN_ITEMS} or more: not used")
            continue
        if factors is None:
            settings = Settings(dim=cfg.factors)
            with run.tracker.progress("media: factors of the items", settings.iterations) as bar:
                factors = ials(log.matrix(data.num_users, data.num_items), settings, seed=experiment.seed,
                               keep=below / "ials.npz", advance=bar.advance)
        _Learner(cfg, name, files, factors, experiment, run).learn(below / name)


@dataclasses.dataclass(frozen=True)
class _Learner:
    """One media/NAME/ that is still to be learned."""

    cfg: MediaConfig
    name: str
    files: MediaFiles
    factors: FoldIn
    experiment: Any
    run: Any

    def learn(self, folder: pathlib.Path) -> None:
        """Reads the files, trains the towers, writes them and the vectors; the vectors last, which ends it."""
        cfg, tell = self.cfg, self.run.tracker
        with tell.progress(f"media {self.name}: reading", len(self.files.rows)) as bar:
            arrays = read_arrays(self.files, cfg.form(self.files.kind), bar.advance)
        places = np.flatnonzero(self.factors.known[self.files.rows])  # of the items to learn from, in `arrays`
        targets = self._targets(places)
        fold = np.full(len(arrays), -1)
        fold[places] = np.random.default_rng((self._seed(0), 1)).permutation(len(places)) % cfg.folds
        mean, deviation = _moments(arrays, places)
        params = []
        for number in range(cfg.folds):
            seen = fold[places] != number if cfg.folds > 1 else np.ones(len(places), bool)
            source = MediaBatches(arrays, places[seen], targets[seen], self.files.kind, mean, deviation,
                                  cfg.num_steps(int(seen.sum())), cfg.batch, self._seed(number))
            params.append(self._fit(source, arrays.take(places[:1]), folder / f"fold-{number}", number))
        trained = TrainedMedia(cfg.tower(self.files.kind), cfg.form(self.files.kind), mean, deviation,
                               cfg.loss != "mse", tuple(params))
        with tell.progress(f"media {self.name}: vectors", len(arrays)) as bar:
            vectors = _embedded(trained, arrays, fold, bar.advance)
        told = float((_unit_np(vectors[places]) * _unit_np(targets)).sum(1).mean())
        about = "items that the tower did not see" if cfg.folds > 1 else "the items that it was trained on"
        tell.say(f"media {self.name}: cosine {told:.3f} of vectors and factors on {about}; "
                 f"{len(places):,} items learned from, {len(arrays):,} have a file")
        checkpoint.save_tree(folder / "towers", {str(n): tree for n, tree in enumerate(params)})
        write_npz(folder / "vectors.npz", vectors=vectors, rows=self.files.rows, mean=mean, deviation=deviation,
                  cosine=told)

    def _targets(self, places: np.ndarray) -> np.ndarray:
        """[n, F] the factors less their mean, over their deviation: what all items share is popularity."""
        rows = self.factors.items[self.files.rows[places]]
        rows = rows - rows.mean(0)
        return (rows / max(float(rows.std()), 1e-9)).astype(np.float32)

    def _seed(self, number: int) -> int:
        """Of a fold's training."""
        words = (self.experiment.seed, zlib.crc32(self.name.encode()), number)
        return int(np.random.SeedSequence(words).generate_state(1)[0]) >> 1

    def _fit(self, source: MediaBatches, example: np.ndarray, folder: pathlib.Path, number: int) -> Any:
        cfg, fuse = self.cfg, self.experiment.fuse
        model = MediaTower(cfg.tower(self.files.kind))
        fitted = train.fit(
            workdir=folder, init_fn=lambda key: model.init(key, example.astype(np.float32))["params"],
            loss_fn=functools.partial(loss, cfg, model), constants=(), source=source,
            tx=make_optimizer(cfg.optim, len(source)), seed=source.seed, mesh=self.run.mesh, rules=MEDIA_RULES,
            log_every=fuse.log_every, checkpoint_every=fuse.checkpoint_every,
            label=f"media {self.name} {number + 1} of {cfg.folds}", tracker=self.run.tracker)
        return jax.device_get(fitted.params)


def _moments(arrays: Arrays, places: np.ndarray) -> tuple[float, float]:
    """Mean and deviation of the values, from evenly spaced items."""
    some = arrays.take(places[::max(1, len(places) // _BLOCK)]).astype(np.float64)
    return float(some.mean()), max(float(some.std()), 1e-6)


def _unit_np(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-9)


def _embedded(trained: TrainedMedia, arrays: Arrays, fold: np.ndarray, advance: Any) -> np.ndarray:
    """[n, F] of all arrays; fold [n]: the tower that did not see the item, -1 for one that none of them saw."""
    out = np.zeros((len(arrays), trained.cfg.out), np.float32)
    for first in range(0, len(arrays), _BLOCK):
        index = np.arange(first, min(first + _BLOCK, len(arrays)))
        padded = np.concatenate([index, np.repeat(index[:1], _BLOCK - len(index))])  # one shape, one program
        found = trained.embed(arrays.take(padded))[:, :len(index)]  # [folds, b, F]
        own = fold[index]
        out[index] = np.where(own[:, None] >= 0, found[np.maximum(own, 0), np.arange(len(index))], trained.mixed(found))
        advance(len(index))
    return out


def media_blocks(data: Dataset, run: Any) -> dict[str, np.ndarray]:
    """{name: [I, F] float32 vectors, 0 where an item has no file} that `learn` left in a run over `data`."""
    out = {}
    for name, (held, path) in _kept(data, run).items():
        vectors, rows = held["vectors"], held["rows"]
        if not np.array_equal(rows, data.raw_media[name].rows):
            raise KgrecError(f"{path}: found vectors of other items, expected those of media/{name}; remove "
                             f"{path.parent} and run it again")
        out[name] = np.zeros((data.num_items, vectors.shape[1]), np.float32)
        out[name][rows] = vectors
    return out


def trained_media(data: Dataset, run: Any) -> dict[str, TrainedMedia]:
    """{name: what gives vectors to the files of new items} that `learn` left."""
    cfg, out = run.experiment.fuse.media, {}
    for name, (held, path) in _kept(data, run).items():
        kind = data.raw_media[name].kind
        tree = checkpoint.load_tree(path.parent / "towers")
        out[name] = TrainedMedia(cfg.tower(kind), cfg.form(kind), float(held["mean"]), float(held["deviation"]),
                                 cfg.loss != "mse", tuple(tree[str(n)] for n in range(len(tree))))
    return out


def _kept(data: Dataset, run: Any) -> Mapping[str, tuple[Mapping[str, np.ndarray], pathlib.Path]]:
    """{name: (arrays, file)} of each media/NAME/ that was learned."""
    out = {}
    for name in data.raw_media:
        path = run.stage("fuse") / "media" / name / "vectors.npz"
        if not path.is_file():
            continue
        try:
            with np.load(path, allow_pickle=False) as file:
                out[name] = {key: file[key] for key in ("vectors", "rows", "mean", "deviation")}, path
        except NPZ_ERRORS as error:
            reason = str(error).partition("\n")[0]
            raise KgrecError(f"{path}: found a damaged file ({reason}), expected the vectors that the fusion stage "
                             f"wrote; remove {path.parent} and run it again") from None
    return out
