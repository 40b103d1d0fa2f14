"""A run's graph and its trained scorer, from what `kgrec graph` leaves; entities and relations by id or name."""

from __future__ import annotations

import difflib
import pathlib
from collections.abc import Sequence

import numpy as np

from kgrec_jax.errors import KgrecError
from kgrec_jax.serving.complete import Completer


def open_run(path: pathlib.Path | str, quiet: bool = False) -> Completer:
    """The training graph of a run with its parts and its structural scorer.

    The parts are the given ones, or the pairs that the graph stage held out, drawn again by the run's seed. Raises
    KgrecError where the folder is no run, its graph stage is not finished, or it has no graph.
    """
    import jax

    from kgrec_jax import checkpoint
    from kgrec_jax.config import Experiment, from_json
    from kgrec_jax.models.graph_embedding import load_graph_embedding
    from kgrec_jax.stages.graph_data import link_data, training_graph
    from kgrec_jax.stages.graph_structure import structure_scorer
    from kgrec_jax.workdir import Run, read_experiment_json, read_json

    path = pathlib.Path(path).expanduser()
    run = Run.open(path, from_json(Experiment, read_experiment_json(path)["config"]), quiet)
    done, folder = run.done("graph"), path / "graph"
    if done is None:
        raise KgrecError(f"{path}: found a run whose graph stage is not finished, expected its tables; finish it with "
                         f"kgrec graph CONFIG --workdir {path}")
    if "skipped" in done:
        raise KgrecError(f"{path}: found a run without a graph ({done['skipped']}), expected triples to complete; add "
                         "a triples.tsv to the data set and run it in a new folder")
    if not (folder / "tables").is_dir() or not (folder / "tables.json").is_file():
        raise KgrecError(f"{folder}: found no tables, expected what the graph stage left; remove the folder and run "
                         "kgrec graph again")
    graph, _ = training_graph(run.dataset.graph)
    told = read_json(folder / "tables.json")
    if told["relation_ids"] != list(graph.relation_ids) or told["entities"] != graph.num_entities:
        raise KgrecError(f"{folder}: found tables of another graph, expected those of {run.experiment.data.path}; "
                         "run the graph stage in a new folder")
    data = link_data(run.experiment.graph, graph, run.experiment.seed)
    saved = checkpoint.load_tree(folder / "tables")
    model, tables = load_graph_embedding(told, saved)
    return Completer(graph, data.part, structure_scorer(model, jax.device_put(tables)), run.tracker,
                     np.asarray(saved["entity"], np.float32))


def find(word: str, ids: Sequence[str], names: Sequence[str], field: str) -> int:
    """The row of an id, else of a name (case does not matter); KgrecError with what is near, or with all that match."""
    if word in ids:
        return ids.index(word)
    folded = word.casefold()
    rows = [k for k, name in enumerate(names) if name.casefold() == folded]
    if len(rows) == 1:
        return rows[0]
    if rows:
        some = ", ".join(repr(ids[k]) for k in rows[:5])
        raise KgrecError(f"{field}: found the name {word!r} {len(rows):,} times, expected an id: {some}")
    by_text = {text.casefold(): text for text in (*ids, *names) if text}
    near = difflib.get_close_matches(folded, by_text, n=3, cutoff=0.5)
    meant = f"; did you mean {' or '.join(repr(by_text[n]) for n in near)}?" if near else ""
    raise KgrecError(f"{field}: found the unknown {word!r}, expected an id or a name in the run's graph{meant}")
