"""Towers on raw images and sounds: the model and its losses by formula, what they learn, the whole run, new items."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from media_world import classes_of, write_world

from kgrec_jax import cli, pipeline
from kgrec_jax.config import Experiment
from kgrec_jax.data import media_batches
from kgrec_jax.data.folder import DataConfig, read_folder
from kgrec_jax.data.interactions import SplitConfig
from kgrec_jax.data.media_batches import MediaBatch, MediaBatches, augmented
from kgrec_jax.data.media_read import Arrays, ImageForm, SoundForm
from kgrec_jax.data.new_items import read_new_items
from kgrec_jax.errors import KgrecError
from kgrec_jax.models.media_towers import MediaTower, MediaTowerConfig, TrainedMedia, patches
from kgrec_jax.models.tower_config import TowerConfig
from kgrec_jax.serving.additions import add_items
from kgrec_jax.serving.recommender import Recommender
from kgrec_jax.stages import fuse, fuse_media, graph, pretrain
from kgrec_jax.stages.fuse_gate import GateConfig
from kgrec_jax.stages.fuse_media import MediaConfig, loss
from kgrec_jax.workdir import Run, read_json

pytest.importorskip("PIL.Image", reason="needs the extra media")
pytest.importorskip("soundfile", reason="needs the extra media")
ITEMS, COLD = 120, 24
SMALL = MediaConfig(image_size=32, sound_rate=8_000, sound_seconds=0.96, sound_mels=32, sound_patch=8, width=32,
                    layers=1, heads=2, factors=8, folds=2, steps=50, batch=32)
KEY = jax.random.key(0)


def experiment(folder, checkpoint_every=50, **media):
    """A run of toy size over a folder."""
    return Experiment(
        data=DataConfig(path=str(folder), split=SplitConfig(kind="fixed")), pretrain=pretrain.Config(mode="off"),
        graph=graph.Config(encoder_mode="off"),
        fuse=fuse.Config(tower=TowerConfig(width=16, max_history=16), steps=30, batch=32,
                         checkpoint_every=checkpoint_every, gate=GateConfig(steps=30, batch=32),
                         media=dataclasses.replace(SMALL, **media)))


@pytest.fixture(scope="module", params=["images", pytest.param("images and sounds", marks=pytest.mark.slow)])
def made(request, tmp_path_factory):
    """(folder with raw files, folder of a finished run, its report)."""
    root, patch = tmp_path_factory.mktemp("media"), pytest.MonkeyPatch()
    patch.setenv("KGREC_CACHE", str(root / "cache"))
    write_world(root / "world", ITEMS, cold=COLD, sounds="sounds" in request.param)
    report = pipeline.run(experiment(root / "world"), root / "run", quiet=True)
    yield root / "world", root / "run", report
    patch.undo()


def numpy_tower(cfg, params, values):
    """MediaTower in NumPy, loops over images and heads."""

    def dense(x, p):
        return x @ p["kernel"] + p.get("bias", 0.0)

    def norm(x, p):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]

    out = []
    for image in values:
        rows, columns, size = image.shape[0] // cfg.patch, image.shape[1] // cfg.patch, cfg.patch
        x = np.stack([image[r * size:(r + 1) * size, c * size:(c + 1) * size].ravel()
                      for r in range(rows) for c in range(columns)])
        x = dense(x, params["patch"]) + params["position_embeddings"]
        for layer in range(cfg.layers):
            normed = norm(x, params[f"norm_{layer}"])
            q, k, v = (dense(normed, params[f"{name}_{layer}"]) for name in ("query", "key", "value"))
            mixed, width = np.zeros_like(q), cfg.width // cfg.heads
            for head in range(cfg.heads):
                part = slice(head * width, (head + 1) * width)
                logits = q[:, part] @ k[:, part].T / np.sqrt(width)
                weights = np.exp(logits - logits.max(-1, keepdims=True))
                mixed[:, part] = weights / weights.sum(-1, keepdims=True) @ v[:, part]
            x = x + dense(mixed, params[f"mix_{layer}"])
            wide = dense(norm(x, params[f"norm_feed_{layer}"]), params[f"feed_{layer}"])
            wide = 0.5 * wide * (1 + np.tanh(np.sqrt(2 / np.pi) * (wide + 0.044715 * wide ** 3)))
            x = x + dense(wide, params[f"feed_out_{layer}"])
        out.append(dense(norm(x, params["norm_out"]).mean(0), params["out"]))
    return np.stack(out)


@pytest.mark.parametrize("shape", [(16, 16, 3), (20, 12, 1)], ids=["image", "spectrogram"])
def test_the_tower_is_the_formula(shape):
    cfg = MediaTowerConfig(patch=4, width=16, layers=2, heads=2, hidden_dropout=0.0, out=5)
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, *shape)).astype(np.float32)
    shapes = jax.eval_shape(MediaTower(cfg).init, KEY, values)["params"]
    params = jax.tree.map(lambda p: rng.normal(0, 0.3, p.shape).astype(np.float32), shapes)  # no bias is 0
    assert patches(jnp.asarray(values), 4).shape == (3, shape[0] // 4 * (shape[1] // 4), 16 * shape[2])
    raw = numpy_tower(cfg, params, (values - 0.5) / 2.0)
    trained = TrainedMedia(cfg, ImageForm(16), 0.5, 2.0, False, (params, params))
    np.testing.assert_allclose(trained.embed(values)[0], raw, atol=5e-4)
    unit = dataclasses.replace(trained, unit=True)
    found = unit.embed(values)
    np.testing.assert_allclose(found[0], raw / np.linalg.norm(raw, axis=1, keepdims=True), atol=5e-4)
    mixed = unit.mixed(np.stack([found[0], found[0][::-1]]))
    np.testing.assert_allclose(np.linalg.norm(mixed, axis=1), 1.0, atol=1e-5)
    np.testing.assert_allclose(mixed, mixed[::-1], atol=1e-6)


class Linear:
    """What a loss needs of a tower."""

    def apply(self, variables, values, deterministic, rngs):
        assert not deterministic and set(rngs) == {"dropout"}
        return jnp.asarray(values).reshape(len(values), -1) @ variables["params"]


def test_losses_are_the_formulas():
    rng = np.random.default_rng(1)
    cfg = dataclasses.replace(SMALL, temperature=0.3)
    model = Linear()
    values = rng.normal(size=(5, 2, 2, 3)).astype(np.float32)
    batch = MediaBatch(values, rng.normal(size=(5, 6)).astype(np.float32), np.float32([1, 1, 1, 1, 0]))
    params = rng.normal(size=(12, 6)).astype(np.float32)
    out = (values.reshape(5, 12) @ params)[:4]
    unit, target = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (out, batch.targets[:4]))
    logits = unit @ target.T / 0.3
    both = [-np.log(np.exp(logits[n, n]) / np.exp(line).sum()) for line_of in (logits, logits.T)
            for n, line in enumerate(line_of)]
    wanted = {"cosine": 1 - (unit * target).sum(1).mean(), "mse": np.square(out - batch.targets[:4]).mean(),
              "infonce": np.mean(both)}
    spoilt = dataclasses.replace(batch, values=np.where(batch.weights[:, None, None, None] > 0, values, 50.0),
                                 targets=np.where(batch.weights[:, None] > 0, batch.targets, -7.0))
    for name, value in wanted.items():
        for given in (batch, spoilt):  # what fills a batch up changes nothing
            got, told = loss(dataclasses.replace(cfg, loss=name), model, params, {}, given, KEY)
            np.testing.assert_allclose(got, value, rtol=1e-4)
            np.testing.assert_allclose(told["cosine"][0] / told["cosine"][1], 1 - wanted["cosine"], rtol=1e-4)


def test_augmentation_moves_mirrors_and_masks():
    rng = np.random.default_rng(2)
    images = rng.normal(size=(40, 16, 16, 3)).astype(np.float32)
    seen = set()
    for before, after in zip(images, augmented(images, "image", rng), strict=True):
        wide = np.pad(before, ((2, 2), (2, 2), (0, 0)), mode="reflect")
        fits = [(r, c, m) for r in range(5) for c in range(5) for m in (1, -1)
                if np.array_equal(wide[r:r + 16, c:c + 16][:, ::m], after)]
        assert len(fits) == 1
        seen.add(fits[0])
    assert len(seen) > 15 and {m for _, _, m in seen} == {1, -1}
    sounds = rng.normal(size=(40, 32, 16, 1)).astype(np.float32)
    after = augmented(sounds, "sound", rng)
    masked = after[..., 0] == 0
    assert (after[~masked] == sounds[~masked]).all()
    frames, bands = masked.all(2).sum(1), masked.all(1).sum(1)  # whole frames, whole bands
    assert frames.max() == 4 and frames.min() == 0 and bands.max() == 2 and bands.min() == 0
    np.testing.assert_array_equal(masked.sum((1, 2)), frames * 16 + bands * 32 - frames * bands)


def test_batches_visit_every_item(monkeypatch):
    monkeypatch.setattr(media_batches, "augmented", lambda values, kind, rng: values)
    arrays = Arrays((np.arange(12, dtype=np.uint8).reshape(12, 1, 1, 1),))
    places = np.array([1, 3, 4, 7, 9, 10, 11])
    source = MediaBatches(arrays, places, places[:, None].astype(np.float32), "image", 2.0, 4.0, 7, 4, 3)
    found = [source[step] for step in range(len(source))]
    for batch in found:
        np.testing.assert_allclose(batch.values[:, 0, 0] * 4 + 2, batch.targets)
        assert (batch.weights == 1).all()
    assert np.bincount(np.concatenate([b.targets[:, 0] for b in found]).astype(int), minlength=12)[places].tolist() \
        == [4] * 7
    few = dataclasses.replace(source, batch=16)[0]
    assert few.weights.tolist() == [1.0] * 7 + [0.0] * 9 and not few.targets[7:].any()
    assert np.array_equal(source[3].targets, found[3].targets)


def auc_of_cold(vectors, data):
    """How often an item of a user's test is nearer to the mean vector of its history than another cold item."""
    train, test = (data.interactions.take(data.part == part) for part in (0, 2))
    history = train.matrix(data.num_users, data.num_items) @ vectors
    scores, cold = history @ vectors.T, np.arange(ITEMS - COLD, ITEMS)
    wins = []
    for user in np.unique(test.user):
        liked = np.unique(test.item[test.user == user])
        wins += [(scores[user, liked, None] > scores[user, np.setdiff1d(cold, liked)]).mean()]
    return float(np.mean(wins))


def check_vectors(vectors, data):
    """Vectors tell the class of cold items, and who touches them about as well as the class does, ties against it."""
    kinds, cold = classes_of(ITEMS), np.arange(ITEMS - COLD, ITEMS)
    assert vectors.shape == (ITEMS, 8) and (np.linalg.norm(vectors, axis=1) > 0.99).all()
    warm = vectors[:ITEMS - COLD]
    centres = np.stack([warm[kinds[:ITEMS - COLD] == k].mean(0) for k in range(4)])
    told = ((vectors[cold] @ centres.T).argmax(1) == kinds[cold]).mean()
    found, ideal = auc_of_cold(vectors, data), auc_of_cold(np.eye(4)[kinds].astype(np.float32), data)
    print(f"class {told:.3f}, AUC {found:.3f} of {ideal:.3f}")
    assert told > 0.7 and found > 0.5 + 0.6 * (ideal - 0.5)  # chance: 0.25 and 0.5


def test_cold_items_are_ranked_by_their_files(made):
    folder, run, report = made
    data = read_folder(folder)
    held = Run.open(run, experiment(folder), quiet=True)
    blocks = fuse_media.media_blocks(data, held)
    assert set(blocks) == set(data.raw_media)
    for vectors in blocks.values():
        check_vectors(vectors, data)
    # The media are all that is known of cold items: the row `features` is theirs alone.
    features, chance = report.models["features"]["cold"], report.models["popularity"]["cold"]
    assert features["users"] > 100 and features["candidates"] == COLD
    assert features["ndcg@10"] > 2.0 * chance["ndcg@10"], (features["ndcg@10"], chance["ndcg@10"])
    assert report.models["fusion"]["cold"]["ndcg@10"] > 2.0 * chance["ndcg@10"]
    assert set(read_json(run / "fuse" / "done.json")["content"]["weights"]) <= {"cover", "clip"}


def test_what_is_held_out_is_not_learned_from(made):
    folder, run, _ = made
    held = Run.open(run, experiment(folder), quiet=True)
    names = held.dataset.raw_media
    inner = fuse.inner_cut(held.split, held.experiment.fuse.gate.inner_share, held.experiment.seed)
    assert len(inner.cold) and len(inner.fit) < len(held.split.train)
    with np.load(run / "fuse" / "media" / "ials.npz") as file:
        touched = np.abs(file["items"]).sum(1) > 0
    np.testing.assert_array_equal(np.flatnonzero(touched), np.unique(inner.fit.item))
    for name in names:  # and of these, each tower was trained without its fold
        assert sorted(p.name for p in (run / "fuse" / "media" / name).iterdir()) == [
            "fold-0", "fold-1", "towers", "vectors.npz"]


def learned(folder, run, **fields):
    """Vectors of a run's media by name, learned in `run` or gone on with there."""
    held = Run.open(run, experiment(folder, **fields), quiet=True)
    fuse_media.learn(held.experiment, held, fuse.inner_cut(held.split, 0.1, 0).fit)
    return fuse_media.media_blocks(held.dataset, held)


@pytest.fixture
def world(request, tmp_path, monkeypatch):
    """A folder with images, or what the test asks for, and a cache of its own."""
    monkeypatch.setenv("KGREC_CACHE", str(tmp_path / "cache"))
    sounds = getattr(request, "param", "images") == "sounds"
    write_world(tmp_path / "world", ITEMS, cold=COLD, images=not sounds, sounds=sounds)
    return tmp_path / "world"


@pytest.mark.parametrize("world", ["sounds"], indirect=True)
def test_sounds_tell_who_touches_a_cold_item(world, tmp_path):
    found = learned(world, tmp_path / "run", folds=1)
    assert list(found) == ["clip"]
    check_vectors(found["clip"], read_folder(world))


@pytest.mark.slow
def test_a_broken_off_training_goes_on(world, tmp_path, monkeypatch):
    fields = {"image_size": 16, "width": 16, "steps": 10, "checkpoint_every": 4}
    whole = learned(world, tmp_path / "whole", **fields)["cover"]
    take, calls = MediaBatches.__getitem__, []

    def stops(self, step):
        calls.append(step)
        if len(calls) > 10 and step == 7:
            raise KgrecError("broken off")
        return take(self, step)

    monkeypatch.setattr(MediaBatches, "__getitem__", stops)
    with pytest.raises(KgrecError, match="broken off"):
        learned(world, tmp_path / "broken", **fields)
    assert not (tmp_path / "broken" / "fuse" / "media" / "cover" / "vectors.npz").exists()
    calls.clear()
    np.testing.assert_array_equal(learned(world, tmp_path / "broken", **fields)["cover"], whole)
    assert sorted(set(calls)) == list(range(4, 10))  # the second tower, from its checkpoint on
    calls.clear()
    learned(world, tmp_path / "broken", **fields)
    assert not calls
    (tmp_path / "broken" / "fuse" / "media" / "cover" / "vectors.npz").write_bytes(b"x")
    with pytest.raises(KgrecError, match="vectors.npz: found a damaged file"):
        learned(world, tmp_path / "broken", **fields)


def test_off_and_too_few(world, tmp_path):
    assert learned(world, tmp_path / "off", mode="off") == {}
    for path in sorted((world / "media" / "cover").iterdir())[fuse_media.MIN_ITEMS - 1:]:
        path.unlink()
    assert learned(world, tmp_path / "few") == {}


def test_new_items_are_read_by_the_same_towers(made, tmp_path, capsys):
    folder, run, _ = made
    whole, data = Recommender.load(run), read_folder(folder)
    cold = np.arange(ITEMS - COLD, ITEMS)[:5]
    new, both = tmp_path / "new", "clip" in data.raw_media
    for name, files in data.raw_media.items():
        (new / "media" / name).mkdir(parents=True)
        for n, row in enumerate(cold):
            if n < 4 or name == "cover":
                shutil.copyfile(files.paths[row], new / "media" / name / f"n{n}{files.paths[row].suffix}")
    (new / "items.tsv").write_text("item_id\n" + "".join(f"n{n}\n" for n in range(5)))
    said = []
    grown = add_items(whole, read_new_items(new, DataConfig()), "new", said.append)
    wanted = f"5 items added, of these with text 0, links 0, {'clip 4, ' * both}cover 5"
    assert any(wanted in line.replace("cover 5, clip 4", "clip 4, cover 5") for line in said), said
    users = np.arange(0, len(whole.user_ids), 5)
    for name in ("features", "sequence"):  # a copy of a cold item's files is scored as that item is
        a, b = (held.model.raw(held.histories.take(users), name) for held in (grown, whole))
        np.testing.assert_allclose(a[:, ITEMS:ITEMS + 4], b[:, cold[:4]], atol=2e-4, rtol=1e-3)
        np.testing.assert_allclose(a[:, :ITEMS], b, atol=2e-4, rtol=1e-3)
    assert cli.main(["items", "add", str(run), str(new), "--out", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    shutil.rmtree(new / "media" / "clip", ignore_errors=True)
    (new / "media" / "cover").rename(new / "media" / "poster")
    add_items(whole, read_new_items(new, DataConfig()), "new", said.append)
    assert said[-1].startswith("note: nothing is known of 5") and any("poster not used" in line for line in said)
    (new / "media" / "poster").rename(new / "media" / "cover")
    sound = dataclasses.replace(whole.intake.towers["cover"], form=SoundForm(8_000, 48, 32))
    with pytest.raises(KgrecError, match="media/cover: found images, expected sounds"):
        add_items(dataclasses.replace(whole, intake=dataclasses.replace(whole.intake, towers={"cover": sound})),
                  read_new_items(new, DataConfig()), "new", said.append)
    next((new / "media" / "cover").iterdir()).write_bytes(b"x")
    with pytest.raises(KgrecError, match="no whole image"):
        add_items(whole, read_new_items(new, DataConfig()), "new", said.append)
    bare = dataclasses.replace(whole, intake=dataclasses.replace(whole.intake, towers={}))
    add_items(bare, read_new_items(new, DataConfig()), "new", said.append)
    assert any("give media/cover.npy" in line for line in said)


@pytest.mark.parametrize("field, value", [
    ("image_size", 4), ("image_patch", 5), ("sound_patch", 7), ("heads", 3), ("folds", 0), ("factors", 0), ("batch", 1),
    ("sound_seconds", 0.12), ("sound_rate", 100), ("dropout", 1.0), ("temperature", 0.0)])
def test_bad_fields_are_named(field, value):
    with pytest.raises(KgrecError, match=f"fuse.media.{field}: found {value}, expected"):
        fuse.check(fuse.Config(media=dataclasses.replace(SMALL, **{field: value})))
    fuse.check(fuse.Config(media=SMALL))
