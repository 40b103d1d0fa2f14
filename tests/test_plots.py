"""The pictures are drawn from what is there, without a warning."""

import json
import warnings

from kgrec_jax.evaluation.plots import draw_plots

FULL = {
    "ndcg@10": 0.3, "recall@20": 0.4, "ci95": {"ndcg@10": [0.28, 0.33], "recall@20": [0.38, 0.41]},
    "warm": {"ndcg@10": 0.32, "recall@20": 0.41, "ci95": {"ndcg@10": [0.3, 0.34], "recall@20": [0.4, 0.42]}},
    "cold": {"ndcg@10": 0.1, "recall@20": 0.2, "ci95": {"ndcg@10": [0.05, 0.15], "recall@20": [0.1, 0.3]}},
    "buckets": {"item_popularity": {"low": {"recall@20": 0.1}, "high": {"recall@20": 0.5}}, "user_activity": {}},
}
PLAIN = {"ndcg@10": 0.2, "recall@20": 0.3}


def names(paths):
    return [path.name for path in paths]


def test_all_pictures_of_a_run_in_any_script(tmp_path):
    run = tmp_path / "电影"
    for stage, rows in {
        "pretrain": [{"step": s, "loss": 5.0 / s, "examples_per_second": 9.0} for s in (1, 2, 3)],
        "graph/text": [
            {"step": 1, "loss": 2.0}, {"step": 1, "mrr": 0.1, "mean_rank": 90.0}, {"step": 2, "loss": None},
            {"step": 2, "mrr": 0.2, "mean_rank": 40.0},
        ],
    }.items():
        (run / stage).mkdir(parents=True)
        (run / stage / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = draw_plots({"popularity": PLAIN, "fusion": FULL}, run)
    assert names(drawn) == ["models.png", "buckets.png", "curves.png"]
    assert sorted(p.name for p in (run / "plots").iterdir()) == sorted(names(drawn))
    for path in drawn:
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_what_is_absent_is_not_drawn(tmp_path):
    assert names(draw_plots({"popularity": PLAIN}, tmp_path)) == ["models.png"]
    assert draw_plots({"ease": {}}, tmp_path) == []
