"""The bench of graph recommenders: its arrays, this program's side, its peer's protocol and its errors."""

import json
import stat
import sys

import numpy as np
import pytest

from kgrec_jax.bench import recommend, recommend_world
from kgrec_jax.cli import main
from kgrec_jax.data.folder import read_folder

USERS, ITEMS = 60, 40

# Stands where RecBole's interpreter would: scores by a rule of its own and their NDCG@10, reckoned one by one.
FAKE = """#!{python}
import json, math, sys
import numpy as np
order, file = sys.argv[2:4]
print("a library that prints")
print(json.dumps({{"program": "fake"}}), flush=True)
if order == {dies!r}:
    sys.exit("it broke here")
if order == "hello":
    print(json.dumps({{"result": {{}}}}))
    sys.exit()
held = np.load(file)
size = int(held["num_users"]), int(held["num_items"])
part = {{}}
for name in ("train", "valid", "test"):
    part[name] = np.zeros(size, bool)
    part[name][tuple(held[name].T)] = True
def ndcg(scores, known, wanted):
    found = []
    for user in np.flatnonzero(wanted.any(1)):
        order = [i for i in np.argsort(-scores[user]) if not known[user, i]][:10]
        gain = sum(1 / math.log2(n + 2) for n, i in enumerate(order) if wanted[user, i])
        found.append(gain / sum(1 / math.log2(n + 2) for n in range(min(10, wanted[user].sum()))))
    return float(np.mean(found))
told = {{"seconds": 2.0, "cpu_s": 1.0}}
if order == "train":
    scores = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    np.save(next(w for w in sys.argv if w.startswith("--scores=")).partition("=")[2], scores)
    row = {{"epoch": 1, "ndcg@10": ndcg(scores, part["train"], part["valid"]), "train_cpu_s": 90.0, "cpu_s": 100.0}}
    print(json.dumps(row))
    out = {{"curve": [row], "best": row, "stopped": "patience", "valid": row["ndcg@10"], "test": 0.1, "prepare": told,
           "fit": told}}
else:
    scores = held["user_factors"] @ held["item_factors"].T
    value = ndcg(scores, part["train"] | part["valid"], part["test"])
    out = {{"before_mb": 300.0, "batch": 4096, "metrics": {{"ndcg@10": value}}, **told}}
print(json.dumps({{"result": {{**out, "peak_mb": 400.0}}}}))
"""


def _fake_peer(tmp_path, dies=""):
    path = tmp_path / "python"
    path.write_text(FAKE.format(python=sys.executable, dies=dies))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Users who touch one of four kinds of items, and two others; the graph knows the kinds of all but two items."""
    monkeypatch.setenv("XLA_FLAGS", "")  # one device, as on the command line
    rng, out = np.random.default_rng(0), tmp_path / "data"
    out.mkdir()
    rows = {name: [] for name in recommend_world.PARTS}
    for user in range(USERS):
        mine = rng.permutation(np.flatnonzero(np.arange(ITEMS) % 4 == user % 4))[:8]
        other = rng.permutation(np.flatnonzero(np.arange(ITEMS) % 4 != user % 4))[:2]
        for name, items in zip(rows, ((*mine[:4], *other), mine[4:6], mine[6:])):
            rows[name] += [f"u{user}\ti{item}\n" for item in items]
    for name, lines in rows.items():
        (out / f"{name}.tsv").write_text("user_id\titem_id\n" + "".join(lines))
    (out / "items.tsv").write_text("item_id\ttitle\n" + "".join(f"i{i}\tItem {i}\n" for i in range(ITEMS)))
    triples = [f"i{i}\tkind\tk{i % 4}\n" for i in range(ITEMS - 2)] + [f"k{k}\tpart\tall\n" for k in range(4)]
    (out / "triples.tsv").write_text("head_id\trelation\ttail_id\n" + "".join(triples))
    return out


def test_both_sides_read_the_linked_items_and_their_triples(folder):
    data = read_folder(folder)
    arrays, left = recommend_world.arrays_of(data, linked=True)
    last = np.isin(data.interactions.item, [data.item_ids.index(f"i{i}") for i in (ITEMS - 2, ITEMS - 1)])
    assert left == last.sum() > 0 and arrays["num_items"] == ITEMS - 2 and arrays["num_users"] == USERS
    assert sum(len(arrays[name]) for name in recommend_world.PARTS) == len(last) - left
    assert len(arrays["triples"]) == ITEMS - 2 + 4
    kind = {int(h): int(t) for h, r, t in arrays["triples"] if h < ITEMS - 2}
    assert sorted(kind) == list(range(ITEMS - 2)) and min(kind.values()) >= ITEMS - 2
    of_user = [{kind[i] for u, i in arrays["test"] if u == user} for user in range(USERS)]
    assert {len(found) for found in of_user} <= {0, 1}  # items kept their triples
    whole, none = recommend_world.arrays_of(data, linked=False)
    assert none == 0 and whole["num_items"] == ITEMS and "triples" not in whole


def test_generated_parts_are_apart_and_cover_every_item():
    found = recommend_world.generated(300, 70, seed=1)
    pairs = [set(map(tuple, found[name].tolist())) for name in recommend_world.PARTS]
    assert sum(map(len, pairs)) == len(set.union(*pairs)) == sum(len(found[name]) for name in recommend_world.PARTS)
    assert {len(np.unique(found[name][:, 0])) for name in recommend_world.PARTS} == {300}
    assert len(np.unique(np.concatenate([found[name][:, 1] for name in recommend_world.PARTS]))) == 70
    suits = found["user_factors"] @ found["item_factors"].T
    assert suits[tuple(found["test"].T)].mean() > suits.mean() + 1.0  # the vectors say who touches what


def test_this_program_alone(folder, capsys):
    words = ["--models", "kgin", "--steps", "30", "--every", "10", "--target", "0.2", "--parts", "train", "--json"]
    assert main(["bench", "recommend", "--data", str(folder), *words]) == 0
    found = json.loads(capsys.readouterr().out)
    ours = found["training"]["kgin"]["ours"]
    assert [row["step"] for row in ours["curve"]] == [10, 20, 30] and "peer" not in found["training"]["kgin"]
    clocks = [row["cpu_s"] for row in ours["curve"]]
    assert clocks == sorted(clocks) and clocks[0] > ours["compile_cpu_s"] > 0
    assert all(row["train_cpu_s"] < row["cpu_s"] for row in ours["curve"])
    assert ours["reached"]["ndcg@10"] >= 0.2 and ours["reached"]["test"] > 0
    assert ours["best"]["ndcg@10"] > 0.3  # six items of a user's kind are left, two of them to be found
    assert not found["ranking"]
    assert "reached" in "\n".join(recommend.lines(found))


@pytest.mark.slow
def test_beside_a_peer(folder, tmp_path, capsys):
    words = ["--models", "lightgcn", "--steps", "10", "--every", "5", "--sizes", "50"]
    assert main(["bench", "recommend", "--data", str(folder), "--peer-python", _fake_peer(tmp_path), *words,
                 "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    model = found["training"]["lightgcn"]
    assert model["target"] == model["peer"]["best"]["ndcg@10"] == pytest.approx(model["judged"], abs=1e-9)
    reached = model["ours"]["reached"]
    assert reached["ndcg@10"] >= model["target"]
    assert model["share"] == {"cpu_s": reached["cpu_s"] / 100, "train_cpu_s": reached["train_cpu_s"] / 90}
    for row, users in zip(found["ranking"], (USERS, 50), strict=True):
        assert row["users"] == users and row["difference"] < 1e-6
        assert row["ratio"]["cpu_s"] == 1.0 / row["ours"]["again"]["cpu_s"]
    told = "\n".join(recommend.lines(found))
    assert "the same to four decimals" in told and "NOT the same" not in told and "beside fake" in told


@pytest.mark.parametrize(("words", "message"), [
    (["--peer-python", sys.executable], "an interpreter that cannot import RecBole"),
    (["--peer-python", "/nowhere/python"], "/nowhere/python, which cannot be run"),
    (["--parts", "train"], "--data: found none"),
    (["--sizes", "8", "--parts", "rank"], "--sizes: found 8 users and 8 items"),
    (["--models", "rgcn"], "--models: found 'rgcn', expected one of"),
])
def test_bad_arguments_are_one_line(words, message, capsys):
    assert main(["bench", "recommend", *words]) == 2
    told = capsys.readouterr().err
    assert message in told and len(told.strip().splitlines()) == 1


def test_bad_data_and_a_peer_that_breaks_are_one_line(folder, tmp_path, capsys):
    def told(*words):
        assert main(["bench", "recommend", "--data", str(folder), "--parts", "train", *words]) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    peer = _fake_peer(tmp_path, dies="train")
    assert told("--peer-python", peer).endswith("expected an answer: it broke here")
    (folder / "triples.tsv").unlink()
    assert "--models: found no triples" in told()
    (folder / "valid.tsv").unlink()
    assert "--data: found no valid part" in told()
