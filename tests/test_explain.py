"""Reasons that are true of the score, of the graph and of the history."""

import json

import numpy as np
import pytest

from kgrec_jax.data.dataset import Graph
from kgrec_jax.data.graph import neighbours
from kgrec_jax.serving import explain as ex

TITLES = (
    "Alien (1979)", "Aliens (1986)", "Blade Runner (1982)", "Clueless (1995)", "Toy Story (1995)", "Brazil (1985)"
)
ALIEN, ALIENS, BLADE, CLUELESS, TOY, BRAZIL = range(6)
NO_NAME, COMEDY, DRAMA, LONELY = 6, 7, 8, 9
DIRECTOR, GENRE, SEQUEL, WRITER = range(4)


def film_graph():
    triples = [
        (ALIEN, DIRECTOR, NO_NAME), (ALIENS, DIRECTOR, NO_NAME), (BLADE, DIRECTOR, NO_NAME),
        (ALIEN, WRITER, NO_NAME), (BLADE, WRITER, NO_NAME),
        (CLUELESS, GENRE, COMEDY), (TOY, GENRE, COMEDY), (BRAZIL, GENRE, COMEDY),
        (ALIEN, GENRE, DRAMA), (ALIENS, GENRE, DRAMA), (BLADE, GENRE, DRAMA), (CLUELESS, GENRE, DRAMA),
        (ALIEN, SEQUEL, ALIENS), (BRAZIL, DIRECTOR, LONELY),
    ]
    return Graph(
        entity_ids=(*(f"i{n}" for n in range(6)), "m.02822", "comedy", "drama", "m.0lone"),
        entity_names=(*TITLES, "", "Comedy", "Drama", ""), entity_texts=("",) * 10,
        relation_ids=("director", "genre", "sequel", "writer"),
        relation_names=("director", "genre", "sequel", "writer"),
        triples=np.array(triples, np.int32), num_items=6, part=np.zeros(len(triples), np.int8),
    )


def explain(item, contributions, history, addends=None, present=None, **overrides):
    graph = film_graph()
    values = np.array(list(contributions.values()))
    arguments = dict(
        item=item, score=float(values.sum()), part_names=tuple(contributions), contributions=values,
        present=np.ones(len(values), bool) if present is None else present, history=np.array(history, np.int64),
        item_names=TITLES, addends=addends or {}, graph=graph, links=neighbours(graph, graph.num_entities),
    )
    return ex.explain(**arguments | overrides)


def test_shares_decompose_the_score_exactly():
    found = explain(TOY, {"collaborative": 1.5, "graph": 0.75, "popularity": -0.25}, [CLUELESS])
    assert [p.part for p in found.parts] == ["collaborative", "graph", "popularity"]
    assert sum(p.contribution for p in found.parts) == 2.0
    assert [p.share for p in found.parts] == [0.6, 0.3, -0.1]
    assert found.text.endswith("(collaborative 60%, graph 30%, popularity -10%)")
    with pytest.raises(ValueError, match="add up to 2.0, expected the score 3.0"):
        explain(TOY, {"collaborative": 1.5, "graph": 0.5}, [], score=3.0)


def test_an_absent_part_has_no_share():
    found = explain(TOY, {"graph": 1.0, "collaborative": 9.0}, [], present=np.array([True, False]), score=1.0)
    assert [(p.part, p.share) for p in found.parts] == [("graph", 1.0)]


def test_an_unnamed_entity_is_named_by_the_history_and_never_by_its_id():
    found = explain(BLADE, {"graph": 1.0}, [ALIENS, ALIEN, TOY])
    texts = [s.text for s in found.shared]
    drama = "genre: Drama, as in Alien and Aliens"
    assert texts == ["same writer as Alien", "same director as Alien and Aliens", drama]
    assert [s.items for s in found.shared] == [(ALIEN,), (ALIEN, ALIENS), (ALIEN, ALIENS)]
    assert found.text == "Same writer as Alien; same director as Alien and Aliens (graph 100%)"
    everything = json.dumps([explain(i, {"graph": 1.0}, [ALIEN, BRAZIL, TOY]).to_dict(TITLES) for i in range(6)])
    assert "m.0" not in everything


def test_direct_links_and_their_direction():
    assert "sequel of Alien" in [s.text for s in explain(ALIENS, {"graph": 1.0}, [ALIEN]).shared]
    assert "sequel: Aliens" in [s.text for s in explain(ALIEN, {"graph": 1.0}, [ALIENS]).shared]


def test_what_the_history_does_not_share_is_no_reason():
    assert explain(BRAZIL, {"graph": 1.0}, [ALIEN]).shared == ()
    assert explain(TOY, {"graph": 1.0}, [TOY]).shared == ()  # the item itself in the history says nothing
    assert explain(TOY, {"graph": 1.0}, [CLUELESS], graph=None, links=None).shared == ()


def test_rare_entities_outweigh_common_ones():
    # The history's items are named first; another one of the same director may follow to tell who it is.
    weights = {s.text.split(",")[0]: s.weight for s in explain(ALIENS, {"graph": 1.0}, [BLADE, CLUELESS]).shared}
    assert weights["same director as Blade Runner and Alien"] == pytest.approx(np.log(6 / 3) * np.log2(2))
    assert weights["genre: Drama"] == pytest.approx(np.log(6 / 4) * np.log2(3))


def test_near_items_get_the_positive_contributions_in_proportion():
    history = [ALIEN, CLUELESS, BRAZIL]
    addends = {"collaborative": np.array([3.0, 1.0, 0.0]), "text": np.array([0.0, 0.5, 0.5]), "graph": np.ones(3)}
    found = explain(TOY, {"collaborative": 3.0, "text": 1.0, "graph": -1.0}, history, addends)
    assert [(n.item, n.part) for n in found.near] == [
        (ALIEN, "collaborative"), (CLUELESS, "collaborative"), (BRAZIL, "text")
    ]
    np.testing.assert_allclose([n.weight for n in found.near], [2.25 / 4, (0.75 + 0.5) / 4, 0.5 / 4])
    assert found.text.startswith("Liked by those who liked Alien and Clueless; genre: Comedy, as in Clueless and")
    assert "reads like Brazil" in found.text


@pytest.mark.parametrize("contributions, history, start", [
    ({"popularity": 1.0}, [], "Popular with many users (popularity 100%)"),
    ({"query": 2.0, "popularity": 0.1}, [], "Fits your words (query 95%, popularity 5%)"),
    ({"weather": 1.0}, [], "Its weather score is high"),
    ({"popularity": -1.0}, [], "The best of what is left"),
    ({"popularity": 0.0}, [], "The best of what is left"),
    ({}, [], "A guess: nothing is known yet"),
])
def test_there_is_always_one_sentence(contributions, history, start):
    found = explain(TOY, contributions, history)
    assert found.text.startswith(start) and "\n" not in found.text


def test_structure_is_json_with_titles():
    found = explain(TOY, {"collaborative": 1.0}, [CLUELESS], {"collaborative": np.array([0.5])})
    told = json.loads(json.dumps(found.to_dict(TITLES)))
    assert told["near"] == [{"item": "Clueless (1995)", "part": "collaborative", "weight": 1.0}]
    assert told["shared"][0]["items"] == ["Clueless (1995)"] and told["parts"][0]["share"] == 1.0


def test_what_every_new_item_gets_is_said_and_has_no_share():
    parts = ex.part_shares(("features", "text", ex.LEVEL), np.array([1.0, 1.0, 6.0]), np.ones(3, bool))
    text = ex.sentence(parts, (), (), ())
    assert text.endswith("(features 50%, text 50%)") and ex.NEW in text and ex.LEVEL not in text
    assert ex.NEW not in ex.sentence(ex.part_shares(("features", ex.LEVEL), np.array([1.0, 0.0]), np.ones(2, bool)), (), (), ())
