"""The whole way on data that lack something: it adapts, says what it lacks, and recommends to everybody."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_encoder import make_tiny_encoder

from kgrec_jax import pipeline
from kgrec_jax.config import Experiment
from kgrec_jax.data.dataset import Dataset
from kgrec_jax.data.folder import DataConfig, write_folder, write_interactions
from kgrec_jax.data.interactions import SplitConfig
from kgrec_jax.data.toy import toy_world
from kgrec_jax.errors import KgrecError
from kgrec_jax.models.towers import TowerConfig
from kgrec_jax.serving.recommender import Recommender
from kgrec_jax.stages import fuse, graph, pretrain
from kgrec_jax.stages.fuse_gate import GateConfig
from kgrec_jax.workdir import Run

USERS, ITEMS = 60, 50
RANDOM = SplitConfig()


def settings(encoder: Path, data: DataConfig, text: bool) -> Experiment:
    """A config that takes seconds; `text`: pretraining and the text steps of the graph stage too."""
    return Experiment(
        encoder=str(encoder), data=data,
        pretrain=pretrain.Config(mode="lora" if text else "off", head_steps=2,
                                 steps=2, batch=8, length=16, checkpoint_every=2),
        graph=graph.Config(dim=8, steps=4, batch=32, text_steps=2, text_batch=8, text_length=16, text_eval=8,
                           encoder_mode="lora" if text else "off"),
        fuse=fuse.Config(tower=TowerConfig(width=16, max_history=8), steps=4, batch=16, text_length=16,
                         text_encoder="choose" if text else "released", gate=GateConfig(steps=4, batch=16)))


# --- the variants: each writes a folder ---------------------------------------------------------------------------


def plain(folder: Path) -> None:
    """The toy world with nothing missing but length."""
    write_folder(toy_world(num_users=USERS, num_items=ITEMS), folder)


def small(num_users: int, num_items: int) -> Callable[[Path], None]:
    """A world of another size, not a word of text and no graph in it."""
    def write(folder: Path) -> None:
        write_folder(toy_world(num_users=num_users, num_items=num_items), folder)
    return write


def without(*names: str) -> Callable[[Path], None]:
    """The toy world less some files."""
    def write(folder: Path) -> None:
        plain(folder)
        for name in names:
            (folder / name).unlink()
    return write


GRAPH_FILES = ("triples.tsv", "entities.tsv", "relations.tsv")


def columns(path: Path, keep: tuple[str, ...]) -> None:
    """Leaves some columns of a table."""
    rows = [line.split("\t") for line in path.read_text().splitlines()]
    at = [rows[0].index(name) for name in keep]
    path.write_text("".join("\t".join(row[i] for i in at) + "\n" for row in rows))


def ids_and_graph(folder: Path) -> None:
    """Items without a text or a title, but in a graph."""
    plain(folder)
    columns(folder / "items.tsv", ("item_id", "entity_id"))


def pairs_alone(folder: Path) -> None:
    """No timestamps, no ratings."""
    plain(folder)
    columns(folder / "interactions.tsv", ("user_id", "item_id"))


def interactions_alone(folder: Path) -> None:
    """A log of pairs and nothing else."""
    without("items.tsv", "users.tsv", *GRAPH_FILES)(folder)
    columns(folder / "interactions.tsv", ("user_id", "item_id"))


def korean(folder: Path) -> None:
    """A catalogue of books in Korean, ids and columns' contents too; two readers' circles."""
    folder.mkdir()
    heroes, things = ("어부", "도둑", "화가", "의사", "소녀", "시인", "농부"), ("바다", "겨울밤", "편지", "정원", "기차", "등불")
    genres = ("추리 소설", "역사 이야기")
    items, log = ["item_id\ttitle\tgenre\toverview"], ["user_id\titem_id\trating\ttimestamp"]
    for n in range(42):
        hero, thing, genre = heroes[n % 7], things[n // 7], genres[n % 2]
        items.append(f"책{n}\t{thing}의 {hero}\t{genre}\t오래된 마을에서 {hero}가 {thing}에 얽힌 비밀을 찾아 나서는 {genre}이다.")
    rng = np.random.default_rng(0)
    for reader in range(40):
        liked = np.flatnonzero(np.arange(42) % 2 == reader % 2)
        log += [f"독자{reader}\t책{n}\t{rng.integers(3, 6)}\t{1000 * reader + t}"
                for t, n in enumerate(rng.permutation(liked)[:rng.integers(6, 12)])]
    (folder / "items.tsv").write_text("\n".join(items) + "\n", encoding="utf-8")
    (folder / "interactions.tsv").write_text("\n".join(log) + "\n", encoding="utf-8")


def chinese(folder: Path) -> None:
    """The toy world's twin."""
    write_folder(toy_world(num_users=USERS, num_items=ITEMS, language="zh"), folder)


def gaps(folder: Path) -> None:
    """Users with one interaction and none, items without interaction, text and graph; media; a repeated pair."""
    plain(folder)
    with open(folder / "users.tsv", "a") as users, open(folder / "interactions.tsv", "a") as log:
        users.write("nobody\n")
        first = (folder / "interactions.tsv").read_text().splitlines()[1].split("\t")
        log.write("once\tfilm3\t4.0\t1000000000\n")
        log.write(f"{first[0]}\t{first[1]}\t1.0\t2000000000\n")
    with open(folder / "items.tsv", "a") as items:
        width = (folder / "items.tsv").read_text().splitlines()[0].count("\t") + 1
        items.write("".join("\t".join([f"blank{n}", *[""] * (width - 1)]) + "\n" for n in range(7)))
    (folder / "media").mkdir()
    np.save(folder / "media" / "cover.npy", np.random.default_rng(0).normal(size=(20, 5)).astype(np.float16))
    (folder / "media" / "cover.ids.txt").write_text("".join(f"film{n}\n" for n in range(20)))


def fixed(valid: bool) -> Callable[[Path], None]:
    """train, test and perhaps valid as files."""
    def write(folder: Path) -> None:
        world = toy_world(num_users=USERS, num_items=ITEMS)
        shares = (0.7, 0.15, 0.15) if valid else (0.8, 0.0, 0.2)
        part = np.random.default_rng(0).choice(3, len(world.interactions), p=shares)
        plain(folder)
        (folder / "interactions.tsv").unlink()
        for number, name in enumerate(("train", "valid", "test")):
            if shares[number]:
                write_interactions(folder / f"{name}.tsv", world, world.interactions.take(part == number))
    return write


def media_alone(folder: Path) -> None:
    """Vectors and nothing else that says what an item is."""
    plain(folder)
    for name in GRAPH_FILES:
        (folder / name).unlink()
    columns(folder / "items.tsv", ("item_id",))
    (folder / "media").mkdir()
    np.save(folder / "media" / "cover.npy", np.random.default_rng(0).normal(size=(ITEMS, 6)).astype(np.float32))
    (folder / "media" / "cover.ids.txt").write_text("".join(f"film{n}\n" for n in range(ITEMS)))


def listed_cold(folder: Path) -> None:
    """A list of cold items beside the data."""
    plain(folder)
    (folder / "cold.txt").write_text("item_id\n" + "".join(f"film{n}\n" for n in range(3, 40, 6)))


def table(name: str, rows: Callable[[], list[str]], *absent: str) -> Callable[[Path], None]:
    """The toy world with one table of other rows, and less some files."""
    def write(folder: Path) -> None:
        without(*absent)(folder)
        (folder / name).write_text("".join(f"{row}\n" for row in rows()))
    return write


def one_text() -> list[str]:
    """An item table in which a single item has a title."""
    return ["item_id\ttitle", *(f"film{n}\t{'A film' if n == 7 else ''}" for n in range(ITEMS))]


def equal_texts() -> list[str]:
    """An item table in which all items read alike."""
    return ["item_id\ttitle\ttext", *(f"film{n}\tSame\tthe same film" for n in range(ITEMS))]


def unnamed() -> list[str]:
    """Triples whose relation and entities have ids that say nothing; one of them stands alone, one is a loop."""
    return ["head_id\trelation\ttail_id", *(f"film{n}\tm.r\tm.0{n % 5}x" for n in range(30)), "film40\tm.s\tm.9",
            "film41\tm.s\tfilm41"]


def everything_known(folder: Path) -> None:
    """A user who has touched all there is."""
    plain(folder)
    with open(folder / "interactions.tsv", "a") as log:
        log.write("".join(f"greedy\tfilm{n}\t5.0\t{n}\n" for n in range(ITEMS)))


def one_user(folder: Path) -> None:
    """As little as can be cut into three parts and a rest."""
    folder.mkdir()
    (folder / "interactions.tsv").write_text("user_id\titem_id\n" + "".join(f"u\ti{n}\n" for n in range(4)) + "v\ti0\n")


@dataclasses.dataclass(frozen=True)
class Variant:
    """Some data, how they are cut, and what has to be said of them."""

    write: Callable[[Path], None]
    split: SplitConfig = RANDOM
    skipped: Mapping[str, str] = dataclasses.field(default_factory=dict)  # stage or row -> words of the reason
    notes: tuple[str, ...] = ()  # words of the report's notes
    rows: tuple[str, ...] = ()  # beside those that every report has
    absent: tuple[str, ...] = ()  # rows that there is nothing for
    text: bool = False  # whether the stages' text steps are run too
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # fields of DataConfig


NO_GRAPH, NO_TEXT = "the data set has no triples", "neither items nor entities have texts"
QUICK = {
    "no graph": Variant(without(*GRAPH_FILES), skipped={"graph": NO_GRAPH}, rows=("text", "features"),
                        absent=("graph",)),
    "korean": Variant(korean, skipped={"pretrain": "n-grams", "graph": NO_GRAPH}, rows=("text", "features"), text=True),
    "cold items, drawn": Variant(plain, SplitConfig(kind="cold-items"), rows=("features",)),
}
SLOW = {
    "interactions alone": Variant(interactions_alone, skipped={"graph": NO_GRAPH, "pretrain": NO_TEXT,
                                                               "text": "no item",
                                                               "features": "no item"},
                                  absent=("graph", "text", "features"), text=True),
    "gaps": Variant(gaps, notes=("repeat a pair", "users of the log", "7 of 57 items have no text"),
                    rows=("graph", "text", "features"), text=True),
    "five users": Variant(small(5, 8)),
    "fixed, with valid": Variant(fixed(True), SplitConfig(kind="fixed")),
    "no item texts": Variant(ids_and_graph, rows=("graph",), absent=("text",), text=True),
    "no items.tsv": Variant(without("items.tsv"), rows=("graph",), absent=("text",)),
    "pairs alone": Variant(pairs_alone),
    "chinese": Variant(chinese, text=True, rows=("text", "graph")),
    "a hundred users": Variant(small(100, 60), text=True),
    "leave-last-out": Variant(plain, SplitConfig(kind="leave-last-out")),
    "time": Variant(plain, SplitConfig(kind="time")),
    "cold items, listed": Variant(listed_cold, SplitConfig(kind="cold-items")),
    "cold share": Variant(plain, SplitConfig(cold_share=0.2)),
    "fixed, without valid": Variant(fixed(False)),
    "media alone": Variant(media_alone, rows=("features",), absent=("text", "graph")),
    "ratings": Variant(plain, data={"min_rating": 4.0}, notes=("rated under 4",)),
    "one user": Variant(one_user),
    "one text": Variant(table("items.tsv", one_text, *GRAPH_FILES), text=True, rows=("text",)),
    "equal texts": Variant(table("items.tsv", equal_texts), text=True),
    "unnamed entities": Variant(table("triples.tsv", unnamed, "entities.tsv", "relations.tsv"), text=True,
                                notes=("have no name",), rows=("graph",)),
    "everything known": Variant(everything_known),
    "no valid": Variant(plain, SplitConfig(valid_share=0.0)),
}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Tiny encoders that read English, and Chinese."""
    root, worlds = tmp_path_factory.mktemp("encoders"), {name: toy_world(language=name) for name in ("en", "zh")}
    return {name: make_tiny_encoder(root / name, [*world.item_texts, *world.graph.entity_names,
                                                  *world.graph.relation_names])
            for name, world in worlds.items()}


def numbers(value: Any, place: str = "report"):
    """(place, number) of every number in a tree of JSON values."""
    if isinstance(value, Mapping):
        for name, below in value.items():
            yield from numbers(below, f"{place}.{name}")
    elif isinstance(value, (list, tuple)):
        for n, below in enumerate(value):
            yield from numbers(below, f"{place}[{n}]")
    elif isinstance(value, (int, float)):
        yield place, value


def check(variant: Variant, experiment: Experiment, folder: Path, report: Any) -> None:
    """What holds of every run, whatever its data lack."""
    bad = [place for place, number in numbers(report.models) if not math.isfinite(number)]
    assert not bad, bad
    assert {"popularity", "item-knn", "user-knn", "ease", "fusion", *variant.rows} <= set(report.models)
    assert not set(variant.absent) & set(report.models)
    for name, words in variant.skipped.items():
        assert words in report.skipped.get(name, "nothing said"), (name, report.skipped)
    for words in variant.notes:
        assert any(words in note for note in report.notes), (words, report.notes)
    assert report.split == (experiment.data.split.kind if experiment.data.split.kind != "auto" else report.split)

    held, data = Recommender.load(folder), Run.open(folder, experiment, quiet=True).dataset
    assert held.user_ids == data.user_ids and held.item_ids == data.item_ids
    items, scores = held.all_users(5)
    listed = items >= 0
    np.testing.assert_array_equal(listed.sum(1), np.minimum(5, data.num_items - held.known.getnnz(axis=1)))
    assert np.isfinite(scores[listed]).all()
    known = held.known.toarray() > 0
    for row in range(data.num_users):
        assert not known[row, items[row][listed[row]]].any(), data.user_ids[row]
    empty = np.flatnonzero(held.histories.matrix.getnnz(axis=1) == 0)[:1]
    for row in {0, data.num_users - 1, *empty.tolist()}:
        found = held.recommend(user=data.user_ids[row], k=5)
        assert [r["item_id"] for r in found] == [data.item_ids[i] for i in items[row] if i >= 0]
        assert all(np.isfinite(r["score"]) and r["reason"] and "\n" not in r["reason"] for r in found)
        np.testing.assert_allclose([r["score"] for r in found], scores[row][listed[row]], rtol=1e-4, atol=1e-4)
    assert held.recommend(history=[held.item_names[0]], k=1)
    if held.query_index is None:
        with pytest.raises(KgrecError, match="without any text"):
            held.recommend(query="film")
    else:
        words = next(t for t in (*data.item_texts, *data.item_names) if t.strip())
        assert held.recommend(query=words, k=3)


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_every_kind_of_data(encoders, tmp_path, name):
    variant = (QUICK | SLOW)[name]
    data, run = tmp_path / "data", tmp_path / "run"
    variant.write(data)
    split = variant.split
    if (data / "cold.txt").is_file():
        split = dataclasses.replace(split, items=str(data / "cold.txt"))
    encoder = encoders["zh" if name == "chinese" else "en"]
    experiment = settings(encoder, DataConfig(path=str(data), split=split, **variant.data), variant.text)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="kgrec_jax")  # what our own code warns of
        report = pipeline.run(experiment, run, quiet=True)
        check(variant, experiment, run, report)
        if name in SLOW:
            held = pipeline.refit(run, tmp_path / "refit", quiet=True)
            assert held.held_out == 0 and held.known.nnz == len(Run.open(run, experiment,
                                                                         quiet=True).dataset.interactions)
            assert np.isfinite(held.all_users(3)[1][held.all_users(3)[0] >= 0]).all()
