"""What a run is going to cost: steps of each stage, which follow from the data's size, and minutes on two idle cores.

The steps are those that the stages will take; the seconds are estimates, and nothing ever stops by them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kgrec_jax.data.dataset import Dataset
from kgrec_jax.data.sources import cache_root, parse_wheel
from kgrec_jax.data.text import Tokenizer, coverage, load_tokenizer
from kgrec_jax.errors import KgrecError
from kgrec_jax.linear.ease import skip_reason
from kgrec_jax.models.encoder_config import MINILM_WEIGHTS, layer_weights
from kgrec_jax.pretrained.hf import read_config
from kgrec_jax.stages import fuse, graph, graph_bi_encoder, pretrain
from kgrec_jax.stages.item_features import COMPARED_TOKENS, item_texts

STAGES = ("pretrain", "graph", "fuse", "evaluate")
_TOKENS_PER_SECOND = 4_500.0  # that it encodes
_TOKENS_PER_WORD = 1.4  # where no tokenizer is at hand
_CANDIDATES = 3  # encoders that read some of the items before one of them reads all
_FLOPS = 5e10  # a second, of inverses and matrix products
_INVERSES, _KERNELS = 12, 60  # item-item matrices that EASE's and the ridge's settings are chosen among
_TOWER_FLOPS = 1.5e10  # a second, of a towers' step
_PROPAGATED = 2e8  # numbers along links a second, of a training step
_ROWS = 10  # models that the report ranks
_SCORES_PER_SECOND = 1.5e7


@dataclasses.dataclass(frozen=True)
class Budget:
    """What one stage is going to do; a stage with a reason in `skipped` does nothing."""

    steps: str  # in words
    seconds: float  # on two idle cores
    skipped: str = ""


@dataclasses.dataclass(frozen=True)
class _Reader:
    """The encoder as far as it can be known without fetching or loading it."""

    weights: float  # of its layers
    has_head: bool

    @property
    def slower(self) -> float:
        """How many times as long a token takes as with the default encoder."""
        return self.weights / MINILM_WEIGHTS


def stage_budgets(experiment: Any, dataset: Dataset, tokenizer: Tokenizer | None = None) -> dict[str, Budget]:
    """Stage -> budget, for `pretrain`, `graph`, `fuse` and `evaluate`.

    With the encoder's `tokenizer` a language that it does not know is foreseen (the stages then read no text) and texts
    are counted in its tokens; without it, by their words.
    """
    reader, texts = _reader(experiment.encoder), pretrain.texts_of(dataset)
    strange = coverage(tokenizer, texts).reason if tokenizer and texts else ""
    out = {"pretrain": _pretrain(experiment.pretrain, len(texts), reader, strange),
           "graph": _graph(experiment, dataset, reader, strange)}
    if not len(dataset.interactions):
        nothing = Budget("", 0.0, "the data set has no interactions")
        return out | {"fuse": nothing, "evaluate": nothing}
    users = min(dataset.num_users, experiment.fuse.eval_users or dataset.num_users)
    evaluate = Budget(f"{_ROWS} models on {users:,} users × {dataset.num_items:,} items",
                      2.0 + _ROWS * users * dataset.num_items / _SCORES_PER_SECOND)
    return out | {"fuse": _fuse(experiment.fuse, dataset, reader, tokenizer, strange), "evaluate": evaluate}


def announce(experiment: Any, held: Any) -> None:
    """Says at the start of a run what each stage is going to do and about how long it takes; `held` is the Run.

    A finished run has nothing left to do, and nothing is said.
    """
    if held.finished:
        return
    tokenizer = None
    folder = local_folder(experiment.encoder)
    if folder is not None:
        try:
            tokenizer = load_tokenizer(folder)
        except KgrecError:
            pass  # the stage that needs it will say so
    budgets = stage_budgets(experiment, held.dataset, tokenizer)
    done = {name for name in STAGES if held.done("fuse" if name == "evaluate" else name) is not None}
    for line in render(budgets, done):
        held.tracker.say(line)


def render(budgets: Mapping[str, Budget], done: set[str] = frozenset()) -> list[str]:
    """The budgets as lines of a small table; the total counts what is not `done` yet."""
    lines = ["stage     minutes  steps (minutes: an estimate for two idle cores)"]
    for name, budget in budgets.items():
        if name in done:
            lines.append(f"{name:<9}       -  finished")
        elif budget.skipped:
            lines.append(f"{name:<9}       -  skipped: {budget.skipped}")
        else:
            lines.append(f"{name:<9} {budget.seconds / 60:7.1f}  {budget.steps}")
    total = sum(b.seconds for name, b in budgets.items() if name not in done and not b.skipped)
    return [*lines, f"{'in all':<9} {total / 60:7.1f}"]


def local_folder(source: str) -> Path | None:
    """The folder of an encoder's source where it is already here; None where it would have to be fetched."""
    if source.startswith("pypi:"):
        wheel = parse_wheel(source)
        path = cache_root() / "sources" / f"{wheel.stem}-{wheel.sha256[:16] or 'unpinned'}" / wheel.member
    elif source.startswith("hub:"):
        return None
    else:
        path = Path(source).expanduser()
    return path if (path / "config.json").is_file() else None


def _pretrain(cfg: pretrain.Config, num_texts: int, reader: _Reader, strange: str) -> Budget:
    if cfg.mode == "off":
        return Budget("", 0.0, "pretrain.mode is off")
    if cfg.corpus:
        return Budget("planned by the stage once the corpus is read", 0.0)
    if not num_texts:
        return Budget("", 0.0, "neither items nor entities have texts")
    if strange and cfg.mode != "scratch":
        return Budget("", 0.0, f"{strange}: the text part uses character n-grams instead")
    plan = pretrain.make_plan(cfg, num_texts - min(int(cfg.valid_share * num_texts), cfg.valid_limit), reader.has_head)
    head = f"{plan.head_steps} of the head alone + " if plan.head_steps else ""
    return Budget(f"{head}{plan.steps} of {cfg.batch} texts × {cfg.length} tokens", plan.seconds * reader.slower)


def _graph(experiment: Any, dataset: Dataset, reader: _Reader, strange: str) -> Budget:
    cfg = experiment.graph
    if not len(dataset.graph.triples):
        return Budget("", 0.0, "the data set has no triples")
    merged, _ = graph.training_graph(dataset.graph)
    data = graph.link_data(cfg, merged, experiment.seed)
    plan = graph.make_plan(cfg, len(data.rows), merged.num_entities)
    against = f"{plan.candidates:,} drawn" if plan.candidates else f"all {merged.num_entities:,}"
    steps, seconds = f"{plan.steps:,} of {cfg.batch} queries against {against} entities", plan.seconds + 3.0
    if cfg.encoder_mode != "off" and strange:
        steps += f"; no text: {strange}"
    elif cfg.encoder_mode != "off":
        text_steps = graph.num_text_steps(cfg, len(data.rows))
        steps += f" + {text_steps} of {cfg.text_batch} texts × at most {cfg.text_length} tokens"
        tokens = text_steps * cfg.text_batch * cfg.text_length
        seconds += 8.0 + 4.0 * reader.weights * tokens / graph.ENCODER_FLOPS
        seconds += 2 * cfg.text_eval * cfg.text_length / (_TOKENS_PER_SECOND / reader.slower)
    pair = cfg.bi_encoder
    if pair.mode != "off" and not strange:
        pair_steps = pair.num_steps(len(data.rows))
        steps += f" + {pair_steps:,} of {pair.batch} queries and answers × at most {pair.length} tokens"
        encoded = merged.num_entities + 2 * sum(len(data.triples(part)) for part in (1, 2))
        seconds += (2 * pair_steps * pair.batch / graph_bi_encoder.TRAINED
                    + encoded / graph_bi_encoder.ENCODED) * pair.length * reader.slower
    if cfg.rules == "on":
        steps += " + rules"
    return Budget(steps, seconds)


def _fuse(cfg: fuse.Config, dataset: Dataset, reader: _Reader, tokenizer: Tokenizer | None, strange: str) -> Budget:
    items = dataset.num_items
    steps = cfg.training.num_steps(len(np.unique(dataset.interactions.user)))
    towers = 2 * cfg.ensemble
    words, seconds = [f"{towers} × {steps:,} of {cfg.batch} users + {cfg.gate.steps} of the gate"], 10.0
    places = 1.0 if cfg.tower.trained_on == "hidden-share" else cfg.tower.max_history / 3.0  # told in a history
    against = min(cfg.tower.candidates or items, items)
    seconds += towers * (3.0 + steps * 24.0 * cfg.batch * places * against * cfg.tower.width / _TOWER_FLOPS)
    if cfg.propagator is not None:
        passes = cfg.propagator.training.num_steps(len(np.unique(dataset.interactions.user)))
        words.append(f"2 × {passes:,} of {cfg.propagation}")
        links = 2.0 * (len(dataset.interactions) + len(dataset.graph.triples))
        seconds += 2 * (5.0 + passes * links * cfg.propagation_dim * cfg.propagation_layers / _PROPAGATED)
    tokens = 0.0 if strange else _tokens(dataset, tokenizer, cfg.text_length)
    if tokens:
        compared = min(tokens, COMPARED_TOKENS) * _CANDIDATES if cfg.text_encoder == "choose" else 0.0
        words.append(f"{tokens:,.0f} tokens of item texts")
        seconds += (tokens + compared) * reader.slower / _TOKENS_PER_SECOND
    if tokens and cfg.encoder != "frozen":  # an upper bound: padded to the longest text, which may be shorter
        passes = 2 if cfg.mlm_weight else 1  # of the texts, and of the same with hidden tokens
        learned = passes * steps * min(cfg.encoder_items, items) * cfg.text_length
        words.append(f"encoder ({cfg.encoder}): 2 × {steps:,} of {min(cfg.encoder_items, items):,} texts × at most "
                     f"{cfg.text_length} tokens")
        seconds += 2 * (4.0 * reader.weights * learned / graph.ENCODER_FLOPS + tokens * reader.slower
                        / _TOKENS_PER_SECOND)
    for name, files in dataset.raw_media.items() if cfg.media.mode != "off" else ():
        learned = cfg.media.num_steps(len(files.rows))
        words.append(f"media {name}: {cfg.media.folds} × {learned:,} of {cfg.media.batch} {files.kind}s")
        seconds += cfg.media.folds * (3.0 + learned * cfg.media.step_flops(files.kind) / _TOWER_FLOPS)
    reason = skip_reason(items)
    if reason:
        words.append(f"no EASE: {reason}")
    else:
        inverse = 2.0 * float(items) ** 3 / _FLOPS
        kernels = _KERNELS if tokens or len(dataset.graph.triples) or dataset.media or dataset.raw_media else 0
        words.append(f"closed forms of {items:,} × {items:,}")
        seconds += inverse * (_INVERSES + kernels)
    return Budget("; ".join(words), seconds)


def _tokens(dataset: Dataset, tokenizer: Tokenizer | None, length: int, sample: int = 500) -> float:
    """Tokens of all item texts as the fusion stage reads them, from evenly spaced ones."""
    texts = [text for text in item_texts(dataset) if text.strip()]
    chosen = texts[::max(1, len(texts) // sample)][:sample]
    if not chosen:
        return 0.0
    if tokenizer is not None:
        counts = [len(ids) for ids in tokenizer.encode(chosen, length)]
    else:
        counts = [min(2 + _TOKENS_PER_WORD * len(text.split()), length) for text in chosen]
    return float(np.mean(counts)) * len(texts)


def _reader(source: str) -> _Reader:
    """What config.json and the names of the weights tell; the default encoder's shape where it is not here yet."""
    folder = local_folder(source)
    if folder is None:
        return _Reader(MINILM_WEIGHTS, False)
    try:
        config = read_config(folder)
    except KgrecError:
        return _Reader(MINILM_WEIGHTS, False)  # reading the encoder will say what is wrong with it
    return _Reader(layer_weights(config), _has_head(folder))


def _has_head(folder: Path) -> bool:
    """Whether the weights have a masked-LM head; a msgpack file does not tell without being read whole."""
    from safetensors import SafetensorError, safe_open

    file = folder / "model.safetensors"
    try:
        with safe_open(file, framework="np") as held:
            return any(name.startswith("cls.predictions.") for name in held.keys())
    except (OSError, SafetensorError):
        return False
