"""A control as a run of its own, beside the finished run whose variant it is, and what it may take over from there.

It has the folder RUN/controls/NAME/seed-S with its own stages; data, split and test are the run's. Stages on which the
variant has no bearing are the run's as well.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import pathlib
import shutil
import time
from collections.abc import Mapping

import numpy as np

from kgrec_jax.config import Experiment, to_json
from kgrec_jax.data import ablation
from kgrec_jax.data.dataset import Dataset
from kgrec_jax.errors import KgrecError
from kgrec_jax.linear.parts import Part
from kgrec_jax.models.recommender import FusedModel, Scale
from kgrec_jax.stages import fuse, graph, item_features
from kgrec_jax.stages.fuse_gate import learn_gate
from kgrec_jax.stages.fuse_parts import scale_of
from kgrec_jax.stages.fuse_rows import profile
from kgrec_jax.tracking import write_json
from kgrec_jax.workdir import FORMAT_VERSION, Run, VariantRun, differences, read_experiment_json

RUN = "run"  # the run itself under another seed
CONTENT, POPULARITY = "no-behaviour", "popularity-from-features"
TRAINED = ("no-graph", "random-graph", "no-text", "shuffled-text")  # whole runs on a variant of the data set
NAMES = (*TRAINED, CONTENT, POPULARITY)


@dataclasses.dataclass(frozen=True)
class ControlRun(VariantRun):
    """A variant of a finished run. It differs in what is known of the items, never in who touched them."""

    name: str

    @functools.cached_property
    def dataset(self) -> Dataset:
        """The variant of the run's data set."""
        data, seed = self.base.dataset, self.experiment.seed
        if self.name == "no-graph":
            return ablation.without_graph(data)
        if self.name == "random-graph":
            return ablation.with_random_graph(data, seed)
        if self.name == "no-text":
            return ablation.without_text(data)
        return ablation.with_texts_of(data, self.text_order) if self.name == "shuffled-text" else data

    @functools.cached_property
    def text_order(self) -> np.ndarray:
        """[I]: the item whose text each item has in `shuffled-text`."""
        warm = np.isin(np.arange(self.base.dataset.num_items), self.split.fit.item)
        return ablation.text_order(warm, self.experiment.seed)


def control_folder(base: Run, name: str, seed: int) -> pathlib.Path:
    """Where a control is kept."""
    return base.path / "controls" / name / f"seed-{seed}"


def fingerprint(base: Run) -> str:
    """SHA-256 of what the run chose and learned, which its controls are compared with and take over."""
    digest = hashlib.sha256(base.split.content_hash().encode())
    for name in ("choices.json", "gate.json"):
        digest.update((base.stage("fuse") / name).read_bytes())
    return digest.hexdigest()


def reads_text(run: Run) -> bool:
    """Whether a finished run's graph stage read words, so that its tables know something of the texts."""
    text = (run.done("graph") or {}).get("text", {"skipped": ""})
    return "skipped" not in text


def open_control(base: Run, real: Run, name: str, seed: int) -> ControlRun:
    """Begins a control or goes on with it; `real` is the run itself under this seed.

    Raises KgrecError where the folder holds a control of another config, or of the run as it was before it was trained
    anew.
    """
    experiment = _experiment(base, name, seed)
    shared: dict[str, Run] = {"pretrain": base}
    texts = name in ("no-text", "shuffled-text")
    if name in (CONTENT, POPULARITY) or (texts and not reads_text(real)):
        shared["graph"] = real
    path = control_folder(base, name, seed)
    control = ControlRun(path, experiment, base.tracker.at(path), base, shared, name)
    held, of, config = path / "experiment.json", fingerprint(base), to_json(experiment)
    if held.is_file():
        before = read_experiment_json(path)
        other = differences(before["config"], config)
        other += [] if before.get("control", {}).get("of") == of else ["state of the run"]
        if other:
            raise KgrecError(f"{path}: found a control of another {', '.join(other[:6])}, expected one of {base.path} "
                             f"as it is; remove {base.path / 'controls'} and run it again")
        return control
    write_json(held, {"format_version": FORMAT_VERSION, "config": config,
                      "control": {"name": name, "of": of, "shared": {k: str(v.path) for k, v in shared.items()}}})
    data = control.dataset
    write_json(path / "dataset.json", {
        "format_version": FORMAT_VERSION, "name": f"{data.name} ({name})", "hash": data.content_hash(),
        "users": data.num_users, "items": data.num_items, "interactions": len(data.interactions),
        "entities": data.graph.num_entities, "triples": len(data.graph.triples)})
    return control


def _experiment(base: Run, name: str, seed: int) -> Experiment:
    """The run's config under a seed, without what only its report is made of."""
    cfg = base.experiment
    stage = dataclasses.replace(cfg.graph, rules="off", text_eval=1, mixture_triples=1,
                                bi_encoder=dataclasses.replace(cfg.graph.bi_encoder, mode="off"),
                                encoder_mode="off" if name == "no-text" else cfg.graph.encoder_mode)
    return dataclasses.replace(cfg, seed=seed, graph=stage)


def train_control(control: ControlRun, real: Run) -> FusedModel:
    """The fused model of a variant, through the stages of any run; what is finished is read."""
    base = control.base
    choices = fuse.Choices.load(base.stage("fuse") / "choices.json")
    if control.done("graph") is None:
        if control.name in ("no-text", "shuffled-text"):
            _take_structure(real, control)
        control.ensure("graph", graph.run)
    _take_texts(base, control, choices.text_source)
    began = time.monotonic()
    model, _, results = fuse.run(control.experiment, control, choices.linear)
    before = control.done("fuse") or {}
    control.finish("fuse", {**results, "wall_seconds": before.get("wall_seconds", time.monotonic() - began)})
    return model


def _take_structure(real: Run, control: ControlRun) -> None:
    """The structure training of the run: it reads triples alone, and these are the same."""
    target = control.stage("graph") / "structure"
    if not target.is_dir():
        temporary = target.with_name(".structure.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(real.stage("graph") / "structure", temporary)
        temporary.replace(target)


def _take_texts(base: Run, control: ControlRun, source: str) -> None:
    """The text vectors of the run, unless they came from an encoder that was tuned on its graph."""
    target, held = control.stage("fuse") / "text.npz", base.stage("fuse") / "text.npz"
    if target.is_file() or not held.is_file() or source == "graph" or control.name == "no-text":
        return
    vectors, source, compared = item_features.load_texts(held, base.dataset.num_items)
    if control.name == "shuffled-text":
        vectors = vectors[control.text_order]
    item_features.save_texts(target, vectors, source, compared)


def content_parts(real: Run) -> dict[str, Part]:
    """What ranks by content alone: the cosine of an item with the profile of a history, for each block of features."""
    vectors, source, _ = item_features.read_texts(real.experiment, real, None, None)
    blocks = item_features.build_content(real.dataset, real, vectors, source).blocks()
    return {name: profile(item_features.unit_rows(block)) for name, block in blocks.items()}


def train_content(control: ControlRun, parts: Mapping[str, Part]) -> FusedModel:
    """The content alone: profiles of histories under a gate that does not know how popular an item is.

    The gate weighs the blocks on the same held-out interactions as the run's; beyond these few weights nothing is
    learned from anybody's behaviour.
    """
    cfg, split, data, seed = control.experiment.fuse, control.split, control.dataset, control.experiment.seed
    shape = data.num_users, data.num_items
    inner = fuse.inner_cut(split, cfg.gate.inner_share, seed)

    def model(log, gate: Mapping) -> FusedModel:
        matrix = log.matrix(*shape)
        warm = (matrix.getnnz(axis=0) > 0).astype(np.int64)
        scale = scale_of(matrix)
        blind = Scale(scale.user_mean, scale.user_std, float(np.log1p(1.0)), 1.0)
        return FusedModel(parts, None, gate, tuple(parts), warm, blind)

    held = fuse.held_out(inner, split, shape, cfg.tower.max_history)
    gate, told = learn_gate(cfg.gate, model(inner.fit, {}), held, control, seed)
    control.finish("fuse", {**told, "names": list(parts)})
    return model(split.fit, gate)
