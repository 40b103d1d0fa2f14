"""Raw images and sounds of items: which file is whose, what they become as arrays, the cache, bad input."""

import math
import os
import shutil
import sys

import numpy as np
import pytest
from media_world import RATE, draw_image, draw_sound, write_world

from kgrec_jax.data import media_read
from kgrec_jax.data.check import check_folder
from kgrec_jax.data.folder import read_folder, write_folder
from kgrec_jax.data.media_files import file_stem, find_media_files
from kgrec_jax.data.media_mel import hz_to_mel, log_mel, mel_filters, mel_to_hz, resampled, samples_of, window_size
from kgrec_jax.data.media_read import ImageForm, SoundForm, decoded, read_arrays
from kgrec_jax.errors import KgrecError

Image = pytest.importorskip("PIL.Image", reason="needs the extra media")
soundfile = pytest.importorskip("soundfile", reason="needs the extra media")
IMAGE, SOUND = ImageForm(16), SoundForm(RATE, 40, 24)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder of 30 items, each with an image and a sound."""
    folder = tmp_path_factory.mktemp("media") / "world"
    write_world(folder, num_items=30, num_users=40, cold=5, sounds=True)
    return folder


@pytest.fixture
def folder(world, tmp_path, monkeypatch):
    """A copy of it that a test may spoil, with a cache of its own."""
    monkeypatch.setenv("KGREC_CACHE", str(tmp_path / "cache"))
    return shutil.copytree(world, tmp_path / "world")


def reference_log_mel(signal, rate, mels, frames):
    """Term by term: Hann window, discrete Fourier transform as a sum, triangles over bins, logarithm, 80 dB."""
    window, size = rate // 20, 1
    while size <= window:
        size *= 2
    top = 2595 * math.log10(1 + rate / 2 / 700)
    centres = [700 * (10 ** (top * k / (mels + 1) / 2595) - 1) for k in range(mels + 2)]
    wave = np.exp(-2j * np.pi * np.outer(np.arange(size // 2 + 1), np.arange(window)) / size)
    hann = np.array([0.5 - 0.5 * math.cos(2 * math.pi * n / window) for n in range(window)])
    out = np.zeros((frames, mels))
    for frame in range(frames):
        start = frame * (rate // 50)
        piece = np.zeros(window)
        piece[:max(0, min(window, len(signal) - start))] = signal[start:start + window]
        power = abs(wave @ (piece * hann)) ** 2
        for band in range(mels):
            low, middle, high = centres[band:band + 3]
            total = 0.0
            for k, value in enumerate(power):
                hz = k * rate / size
                if low < hz <= middle:
                    total += value * (hz - low) / (middle - low)
                elif middle < hz < high:
                    total += value * (high - hz) / (high - middle)
            out[frame, band] = math.log(max(total, 1e-10))
    return np.maximum(out, out.max() - 8 * math.log(10))


def test_log_mel_is_the_formula():
    rng = np.random.default_rng(0)
    signal = np.sin(np.arange(900) * 0.4) + rng.normal(0, 0.1, 900)
    for frames in (3, 8):  # the longer one ends in silence
        np.testing.assert_allclose(log_mel(signal, RATE, 12, frames), reference_log_mel(signal, RATE, 12, frames),
                                   atol=2e-4)
    assert samples_of(8, RATE) == 7 * 160 + 400 and window_size(RATE) == (400, 512)
    np.testing.assert_allclose(mel_to_hz(hz_to_mel([0.0, 440.0, 4000.0])), [0, 440, 4000], atol=1e-9)
    assert hz_to_mel(1000.0) == pytest.approx(1000.0, abs=0.1)  # by which the scale is defined
    for rate in (8_000, 16_000, 44_100):
        assert (mel_filters(rate, window_size(rate)[1], 128).sum(1) > 0).all()
    silent = log_mel(np.zeros(10), RATE, 12, 3)
    assert np.isfinite(silent).all() and np.ptp(silent) == 0


def test_log_mel_is_librosas():
    filters = pytest.importorskip("librosa.filters", reason="compares with librosa where it is installed")
    ours = mel_filters(16_000, 1024, 64)
    np.testing.assert_allclose(ours, filters.mel(sr=16_000, n_fft=1024, n_mels=64, htk=True, norm=None), atol=1e-5)


@pytest.mark.parametrize("pitch", [300.0, 1200.0, 3000.0])
def test_a_tone_lies_in_its_band(pitch):
    time = np.arange(3 * 44_100) / 44_100
    low = resampled(np.sin(2 * np.pi * pitch * time), 44_100, RATE)
    assert len(low) == 3 * RATE
    centres = mel_to_hz(np.linspace(0, hz_to_mel(RATE / 2), 34))[1:-1]
    loudest = log_mel(low, RATE, 32, 50).mean(0).argmax()
    assert loudest == abs(hz_to_mel(centres) - hz_to_mel(pitch)).argmin()
    above = resampled(np.sin(2 * np.pi * 6_000 * time), 44_100, RATE)  # which the lower rate cannot hold
    assert np.abs(above[500:-500]).max() < 0.05


def test_files_find_their_items(folder, tmp_path):
    ids = {'a/b': 0, "50%": 1, ".dot": 2, "ä ö": 3, "plain": 4, "x.png": 5, "none": 6}
    below = tmp_path / "odd" / "media" / "cover"
    below.mkdir(parents=True)
    for item in list(ids)[:-1]:
        (below / f"{file_stem(item)}.PNG").write_bytes(b"not looked into here")
    (below / ".DS_Store").write_bytes(b"")
    (tmp_path / "odd" / "media" / "blank").mkdir()
    found, notes = find_media_files(tmp_path / "odd", ids)
    assert found["cover"].kind == "image" and found["cover"].rows.tolist() == [0, 1, 2, 3, 4, 5]
    assert notes == ["media/blank: empty, not used"] and list(found) == ["cover"]
    data = read_folder(folder)
    assert {name: (files.kind, len(files.rows)) for name, files in data.raw_media.items()} == {
        "clip": ("sound", 30), "cover": ("image", 30)}
    lines = check_folder(folder, say=lambda line: None).render()
    cold = data.num_items - len(np.unique(data.interactions.item))
    assert f"media         cover: image files of 30 of 30 items, of {cold} of the {cold} without history" in lines


def test_content_and_not_place_is_hashed(folder, tmp_path):
    data = read_folder(folder)
    write_folder(data, tmp_path / "again")
    assert read_folder(tmp_path / "again").content_hash() == data.content_hash()
    one = next((folder / "media" / "clip").iterdir())
    soundfile.write(one, draw_sound(0, 999), RATE, format={".wav": "WAV", ".flac": "FLAC", ".ogg": "OGG"}[one.suffix])
    assert read_folder(folder).content_hash() != data.content_hash()
    other = {name: tmp_path / name for name in ("one", "two")}  # above 4 MiB: size, beginning, middle and end
    for path in other.values():
        (path / "media" / "clip").mkdir(parents=True)
        (path / "media" / "clip" / "i.wav").write_bytes(bytes(5 << 20))
    first, second = (find_media_files(path, {"i": 0})[0]["clip"].digest for path in other.values())
    assert first == second
    large = other["two"] / "media" / "clip" / "i.wav"
    large.write_bytes(bytes((5 << 20) - 1) + b"x")
    assert find_media_files(other["two"], {"i": 0})[0]["clip"].digest != first


def test_images_become_upright_squares(tmp_path):
    wide = np.zeros((30, 90, 3), np.uint8)
    wide[:, 30:60], wide[:, 60:] = (200, 100, 50), (255, 255, 255)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert abs(IMAGE.read(tmp_path / "wide.png")[:, 2:-2].astype(int) - [200, 100, 50]).max() <= 2
    turned = np.zeros((40, 40, 3), np.uint8)
    turned[:20] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # held with its right side up: shown after a quarter turn to the right
    Image.fromarray(turned).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    found = IMAGE.read(tmp_path / "turned.jpg").mean(2)
    assert found[:, 9:].min() > 240 and found[:, :7].max() < 15
    clear = np.zeros((20, 20, 4), np.uint8)
    Image.fromarray(clear).save(tmp_path / "clear.png")
    assert (IMAGE.read(tmp_path / "clear.png") == 255).all()
    Image.fromarray(np.full((20, 20), 40_000, np.uint16)).save(tmp_path / "deep.png")
    assert (IMAGE.read(tmp_path / "deep.png") == 40_000 >> 8).all()
    Image.fromarray(draw_image(1, 0)).save(tmp_path / "called.webp", format="PNG")  # read by its content
    assert IMAGE.read(tmp_path / "called.webp").shape == (16, 16, 3)


def test_sounds_become_spectrograms(tmp_path):
    tone = draw_sound(2, 0, seconds=0.8)
    soundfile.write(tmp_path / "mono.wav", tone, RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "stereo.wav", np.stack([tone, tone], 1), RATE, subtype="FLOAT")
    expected = log_mel(tone, RATE, 24, 40)[..., None]
    for name in ("mono", "stereo"):
        np.testing.assert_allclose(SOUND.read(tmp_path / f"{name}.wav"), expected, atol=1e-3)
    lead = np.concatenate([np.zeros(5 * RATE, np.float32), tone, np.zeros(5 * RATE, np.float32)])
    soundfile.write(tmp_path / "long.flac", lead, RATE)  # its middle is what is heard
    assert np.corrcoef(SOUND.read(tmp_path / "long.flac")[:36].ravel(), expected[:36].ravel())[0, 1] > 0.95
    soundfile.write(tmp_path / "short.ogg", tone[:RATE // 5], RATE)
    short = SOUND.read(tmp_path / "short.ogg")
    assert short.shape == SOUND.shape and short[20:].max() < short[:8].max() - 5


def test_arrays_are_decoded_once(folder, monkeypatch):
    monkeypatch.setattr(media_read, "PART", 8)
    files = read_folder(folder).raw_media["cover"]
    calls, told = [], []
    read = ImageForm.read

    def counted(self, path):
        if len(calls) == 20:
            raise KgrecError("broken off")
        calls.append(path)
        return read(self, path)

    monkeypatch.setattr(ImageForm, "read", counted)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    with pytest.raises(KgrecError, match="broken off"):
        read_arrays(files, IMAGE)
    monkeypatch.setattr(ImageForm, "read", lambda self, path: calls.append(path) or read(self, path))
    calls.clear()
    arrays = read_arrays(files, IMAGE, told.append)
    assert len(calls) == 14 and sum(told) == 30 == len(arrays)  # two parts of eight were there
    index = np.array([29, 0, 17, 17, 3])
    expected = np.stack(list(decoded([files.paths[i] for i in index], IMAGE)))
    np.testing.assert_array_equal(arrays.take(index), expected)
    calls.clear()
    read_arrays(files, IMAGE)
    assert not calls
    part = sorted((folder.parent / "cache" / "media").rglob("*.npy"))[1]
    part.write_bytes(part.read_bytes()[:200])
    np.testing.assert_array_equal(read_arrays(files, IMAGE).take(index), expected)
    assert len(calls) == 8
    read_arrays(files, ImageForm(20))  # another form is another entry
    assert len(calls) == 38


def spoil(folder, name, content):
    """Replaces the content of the first file of a kind."""
    path = sorted((folder / "media").rglob(name))[0]
    path.write_bytes(content(path.read_bytes()))
    return path


@pytest.mark.parametrize("name, form, content, words", [
    ("*.png", IMAGE, lambda b: b"", "an empty file"),
    ("*.png", IMAGE, lambda b: b[:len(b) // 2], "no whole image"),
    ("*.jpg", IMAGE, lambda b: b[:len(b) // 2], "no whole image"),
    ("*.webp", IMAGE, lambda b: b[:len(b) // 2], "no whole image"),
    ("*.png", IMAGE, lambda b: b"item_id\ttitle\n", "no whole image"),
    ("*.jpg", IMAGE, lambda b: b"GIF89a" + bytes(50), "no whole image"),
    ("*.wav", SOUND, lambda b: b"", "an empty file"),
    ("*.wav", SOUND, lambda b: b[:len(b) // 2], "cut short"),
    ("*.flac", SOUND, lambda b: b[:len(b) // 2], "found "),
    ("*.ogg", SOUND, lambda b: b[:40], "no whole sound"),
    ("*.wav", SOUND, lambda b: b"not a sound at all", "no whole sound"),
    ("*.wav", SOUND, lambda b: b[:4] + (36).to_bytes(4, "little") + b[8:40] + bytes(4), "no samples"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_damaged_files_are_named(folder, name, form, content, words):
    path = spoil(folder, name, content)
    with pytest.raises(KgrecError, match="expected (JPEG|WAV).*; replace or remove it") as error:
        form.read(path)
    assert str(path) in str(error.value) and words in str(error.value) and "\n" not in str(error.value)
    kind = "cover" if form is IMAGE else "clip"
    with pytest.raises(KgrecError, match="found"):
        read_arrays(read_folder(folder).raw_media[kind], form)


def test_not_a_number_is_named(tmp_path):
    soundfile.write(tmp_path / "nan.wav", np.full(RATE, np.nan, np.float32), RATE, subtype="FLOAT")
    with pytest.raises(KgrecError, match="nan.wav: found NaN or infinity"):
        SOUND.read(tmp_path / "nan.wav")


def test_misplaced_files_are_named(folder):
    cover = folder / "media" / "cover"

    def message(path, content=b"x", make=None):
        make = make or (lambda: path.write_bytes(content))
        make()
        with pytest.raises(KgrecError) as error:
            read_folder(folder)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        return str(error.value)

    assert "found a file of 'stranger'" in message(cover / "stranger.png")
    assert "found a file of another format" in message(cover / "notes.txt")
    assert "found a sound beside" in message(cover / "item 0%2Fb.wav")
    assert "a second file of the item 'item 0/b'" in message(cover / "item 0%2Fb.jpeg")
    assert "found a folder" in message(cover / "more", make=(cover / "more").mkdir)
    text = folder / "media" / "text"
    assert "found the name 'text'" in message(text, make=lambda: shutil.copytree(cover, text))
    np.save(folder / "media" / "cover.npy", np.ones((1, 2), np.float32))
    (folder / "media" / "cover.ids.txt").write_text("item 0/b\n")
    with pytest.raises(KgrecError, match="found cover.npy and the folder cover/"):
        read_folder(folder)


@pytest.mark.parametrize("module, kind", [("PIL.ImageOps", "image"), ("soundfile", "sound")])
def test_a_missing_extra_is_one_line(module, kind, monkeypatch, folder):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(KgrecError, match=r"expected the extra `media`; pip install 'kgrec-jax\[media\]'"):
        media_read.check_extra(kind)
    assert read_folder(folder).raw_media  # nothing is decoded for the counts
