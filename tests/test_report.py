"""The report holds every figure, and says them in words."""

import io
import json

import numpy as np
import pytest
import scipy.sparse as sp
from rich.console import Console

from kgrec_jax.errors import KgrecError
from kgrec_jax.evaluation.ranking import evaluate_ranking
from kgrec_jax.evaluation.render import print_report
from kgrec_jax.evaluation.report import FORMAT_VERSION, make_report, read_report, write_report
from kgrec_jax.evaluation.significance import bootstrap_ci


@pytest.fixture(scope="module")
def results():
    rng = np.random.default_rng(0)
    fit = rng.random((40, 30)) < 0.2
    fit[:, :5] = False
    relevant = (rng.random(fit.shape) < 0.2) & ~fit
    truth = relevant + rng.normal(size=fit.shape)
    return {
        name: evaluate_ranking(
            lambda users, s=scores: s[users].astype(np.float32),
            known=sp.csr_matrix(fit), relevant=sp.csr_matrix(relevant), num_items=30,
        )
        for name, scores in (("popularity", fit.sum(0) + 0 * truth), ("fusion", truth))
    }


def _links(mrr):
    return {"test": {"mrr": mrr, "hits@1": 0.2, "hits@3": 0.3, "hits@10": 0.5, "queries": 1234.0},
            "valid": {"mrr": 0.9}}


LINKS = _links(0.25) | {"structure": _links(0.2), "text": _links(0.125)}


@pytest.fixture
def report(results):
    return make_report(
        results, name="电影 | films", split="random", fit_on="train+valid", history="train+valid", seed=0,
        reference="fusion", link_prediction=LINKS, timing={"graph": 12.34},
        skipped={"ease": "the Gram matrix needs 160 GB"}, notes=("3 entities without a name",),
        example={
            "user": "196", "history": ["Alien"],
            "recommendations": [{"title": "A | B\nC [红]", "score": 1.5, "reason": "Same director as Alien"}],
        },
    )


def test_json_holds_every_figure(report, results, tmp_path):
    write_report(report, tmp_path)
    held = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert held["format_version"] == FORMAT_VERSION and held["fit_on"] == held["history"] == "train+valid"
    assert held["candidates"] == 30 and held["users"] == len(results["fusion"].users)
    assert list(held["models"]) == ["popularity", "fusion"]
    fusion, result = held["models"]["fusion"], results["fusion"]
    for metric, value in result.means().items():
        assert fusion[metric] == value
    np.testing.assert_allclose(fusion["ci95"]["ndcg@10"], bootstrap_ci(result.per_user["ndcg@10"], seed=0), atol=1e-12)
    assert fusion["cold"]["recall@20"] == result.cold.means()["recall@20"] and fusion["cold"]["candidates"] == 5
    assert len(fusion["warm"]["ci95"]["mrr@20"]) == 2
    assert set(fusion["buckets"]["item_popularity"]) == {"low", "middle", "high"}
    pair = held["paired"]["popularity"]["ndcg@10"]
    assert pair["difference"] == pytest.approx(fusion["ndcg@10"] - held["models"]["popularity"]["ndcg@10"])
    assert pair["standard_error"] > 0
    assert held["skipped"] == {"ease": "the Gram matrix needs 160 GB"} and held["timing"] == {"graph": 12.34}
    assert read_report(tmp_path) == report


def test_markdown_says_it_in_tables(report, tmp_path):
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "models.png").touch()
    write_report(report, tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert text.startswith("# 电影 \\| films\n")
    assert "| 1 | A \\| B C [红] | 1.500 | Same director as Alien |" in text
    assert "Fitted on: train+valid. History: train+valid." in text
    assert "![models](plots/models.png)" in text and "- ease: the Gram matrix needs 160 GB" in text
    for name, mrr in (("all", "0.2500"), ("structure", "0.2000"), ("text", "0.1250")):
        assert f"| {name} | {mrr} | 0.2000 | 0.3000 | 0.5000 | 1,234 |" in text
    assert "| graph | 12.3 |" in text
    assert f"[{report.models['fusion']['ci95']['ndcg@10'][0]:.4f}, " in text
    lines = text.splitlines()
    for n, line in enumerate(lines):
        if line.startswith("|---"):  # every table is rectangular
            columns = line.count("---")
            for row in (lines[n - 1], *lines[n + 1 : n + 3]):
                assert not row or row.replace("\\|", "").count("|") == columns + 1, row


def test_the_terminal_shows_models_and_reasons(report):
    out = io.StringIO()
    print_report(report, Console(file=out, width=80, force_terminal=False))
    text = out.getvalue()
    assert text.count("Recall@20") == 4 and "warm" in text and "cold" in text
    pair = report.paired["popularity"]["recall@20"]
    assert f"fusion minus popularity, the best of the others: Recall@20 {pair['difference']:+.4f} ± " in text
    assert "Same director as Alien" in text and "[红]" in text and "…" not in text
    assert f"{report.models['popularity']['ndcg@10']:.4f}" in text
    assert "ease: skipped, the Gram matrix needs 160 GB" in text


def test_one_user_and_no_extras_still_make_a_report(tmp_path):
    result = evaluate_ranking(
        lambda users: np.ones((1, 4), np.float32), known=sp.csr_matrix((1, 4)),
        relevant=sp.csr_matrix(np.eye(1, 4)), fit=sp.csr_matrix(np.ones((1, 4))), num_items=4,
    )
    report = make_report(
        {"fusion": result, "popularity": result}, name="x", split="random", fit_on="train", history="train", seed=0,
        reference="fusion", link_prediction={}, timing={}, skipped={}, example={},
    )
    write_report(report, tmp_path)
    assert read_report(tmp_path).paired["popularity"]["ndcg@10"] == {"difference": 0.0, "standard_error": None}
    text = (tmp_path / "report.md").read_text()
    assert "Warm and cold" not in text and "nan" not in text
    print_report(read_report(tmp_path), Console(file=io.StringIO()))


def test_a_report_that_cannot_be_read_is_named(report, tmp_path):
    with pytest.raises(KgrecError, match="found no report"):
        read_report(tmp_path)
    write_report(report, tmp_path)
    path = tmp_path / "report.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 99'))
    with pytest.raises(KgrecError, match="found format version 99, expected 1"):
        read_report(tmp_path)
    path.write_text('{"a": 1,\n')
    with pytest.raises(KgrecError, match=r"report.json:2: found .*, expected JSON"):
        read_report(tmp_path)
