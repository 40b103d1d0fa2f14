"""The folder of plain files: everything comes back as it was, and what is damaged or foreign is named."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp

from kgrec_jax.errors import KgrecError
from kgrec_jax.serving import store
from kgrec_jax.serving.store import Files


@dataclasses.dataclass(frozen=True)
class Inner:
    table: np.ndarray
    matrix: sp.csr_matrix | None


@dataclasses.dataclass(frozen=True)
class Outer:
    name: str
    rate: float
    count: int
    flag: bool
    nothing: None
    scalar: np.float32
    ids: tuple
    few: tuple
    params: dict
    parts: dict
    vocabulary: dict
    files: Files


CLASSES = (Inner, Outer)


def example(folder):
    rng = np.random.default_rng(0)
    large = rng.standard_normal((600, 600)).astype(np.float32)  # beyond the size from which arrays are mapped
    matrix = sp.random(50, 40, 0.2, "csr", dtype=np.float32, random_state=0)
    return Outer("名字 \u2028 \"a\"", 0.1, 3, True, None, np.float32(1 / 3),
                 tuple(f"id {n}\nπ" for n in range(80)), ("a", 1, (2.5, float("inf"))),
                 {"tower": {"dense": {"kernel": jnp.arange(6.0).reshape(2, 3)}}, "level": np.zeros(())},
                 {"a/b": Inner(large, matrix), "a_b": Inner(np.asfortranarray(large[:, :7]), None),
                  "A_B": Inner(large, matrix), "empty": Inner(np.zeros((0, 4), np.int8), None)},
                 {f"w{n}": n for n in range(99)}, Files(folder, ("config.json",)))


@pytest.fixture
def saved(tmp_path):
    """(what was saved, the folder)."""
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "config.json").write_text("{}")
    value = example(tmp_path / "from")
    store.save(tmp_path / "held", value, CLASSES, {"what": "a test"})
    return value, tmp_path / "held"


def same(a, b):
    if dataclasses.is_dataclass(a) and not isinstance(a, Files):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if sp.issparse(a):
        return all(same(getattr(a, part), getattr(b, part)) for part in ("data", "indices", "indptr", "shape"))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if hasattr(a, "dtype"):
        a, b = np.asarray(a), np.asarray(b)
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return a == b


def test_everything_comes_back_and_a_copy_needs_nothing_else(saved, tmp_path):
    value, folder = saved
    shutil.copytree(folder, tmp_path / "elsewhere" / "copy")
    shutil.rmtree(folder)
    shutil.rmtree(tmp_path / "from")
    back = store.load(tmp_path / "elsewhere" / "copy", CLASSES)
    assert back.files.names == ("config.json",) and (back.files.folder / "config.json").read_text() == "{}"
    assert same(dataclasses.replace(value, files=None), dataclasses.replace(back, files=None))
    held = back.parts["a/b"].table
    assert not held.flags.writeable and back.parts["A_B"].table is held  # mapped, and equal arrays are held once
    assert back.parts["a_b"].table.flags.f_contiguous


def test_nothing_but_json_and_plain_arrays(saved):
    _, folder = saved
    for file in folder.iterdir():
        assert file.suffix in (".json", ".npy") or file.is_dir()
        if file.suffix == ".npy":
            np.load(file, allow_pickle=False)
    assert json.loads((folder / store.MANIFEST).read_text(encoding="utf-8"))["about"] == {"what": "a test"}


def test_the_old_one_stays_until_the_new_one_is_complete(saved):
    value, folder = saved
    bad = dataclasses.replace(value, name="new", params={"bad": object()})
    with pytest.raises(TypeError, match="params.bad"):
        store.save(folder, bad, CLASSES, {})
    assert store.load(folder, CLASSES).name == value.name
    store.save(folder, dataclasses.replace(store.load(folder, CLASSES), name="new"), CLASSES, {})  # onto its own files
    assert store.load(folder, CLASSES).name == "new"
    assert [p.name for p in folder.parent.iterdir() if p.name.startswith(".")] == []
    folder.rename(folder.with_name(".held.old"))  # killed between the two renames
    assert store.load(folder, CLASSES).name == "new"


@pytest.mark.parametrize("name", ["parts.a_b.table.npy", "parts.a_b.matrix.data.npy", "ids.json", "recommender.json"])
@pytest.mark.parametrize("damage", ["cut", "empty", "gone"])
def test_a_damaged_file_is_named(saved, name, damage):
    _, folder = saved
    file = folder / name
    whole = file.read_bytes()
    file.unlink()
    if damage != "gone":
        file.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"")
    with pytest.raises(KgrecError, match=name.replace(".", r"\.")) as caught:
        store.load(folder, CLASSES)
    assert "\n" not in str(caught.value) and "kgrec run" in str(caught.value)


def edited(folder, change):
    manifest = json.loads((folder / store.MANIFEST).read_text(encoding="utf-8"))
    change(manifest)
    (folder / store.MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


@pytest.mark.parametrize("change, words", [
    (lambda m: m.update(format_version=99), "found format version 99, expected 2"),
    (lambda m: m.update(format="cake"), "expected a recommender"),
    (lambda m: m["content"].update({"class": "Cake"}), "unknown class Cake, expected one of Inner, Outer"),
    (lambda m: m["content"]["fields"].update(cake=1), "does not fit"),
    (lambda m: m["content"]["fields"]["few"].update(kind="cake"), "unknown kind 'cake'"),
    (lambda m: m["content"]["fields"]["ids"].update(file="../from/config.json"), "leaves the folder"),
    (lambda m: m["content"]["fields"]["ids"].update(count=81), "found 80 entries, expected 81"),
    (lambda m: m["content"]["fields"]["params"]["items"]["level"].update(shape=[2]), "expected \\[2\\]"),
    (lambda m: m.pop("content"), "does not fit"),
])
def test_what_is_foreign_is_named(saved, change, words):
    _, folder = saved
    edited(folder, change)
    with pytest.raises(KgrecError, match=words):
        store.load(folder, CLASSES)


def test_a_pickle_of_before_is_not_opened(tmp_path):
    (tmp_path / "recommender.pkl").write_bytes(b"anything")
    with pytest.raises(KgrecError, match="format version 1"):
        store.load(tmp_path, CLASSES)
    (tmp_path / store.MANIFEST).write_text("[1]")
    with pytest.raises(KgrecError, match="expected a recommender"):
        store.load(tmp_path, CLASSES)
    # An array of objects would be code.
    with pytest.raises(TypeError, match="Python objects"):
        store.save(tmp_path / "new", Inner(np.array([{}], object), None), CLASSES, {})
