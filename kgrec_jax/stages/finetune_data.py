"""What a fine-tuning reads before it trains: its folder, its examples, its encoder and tokenizer."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np

from kgrec_jax.config import to_json
from kgrec_jax.data.finetune import (Encoded, Examples, ExampleSource, class_names, class_rows, encode, find_parts,
                                     read_examples, read_lines)
from kgrec_jax.data.finetune_zh import write_news
from kgrec_jax.data.folder import read_folder
from kgrec_jax.data.sources import resolve
from kgrec_jax.data.text import Tokenizer, coverage, load_tokenizer, train_wordpiece
from kgrec_jax.errors import KgrecError
from kgrec_jax.models import encoders
from kgrec_jax.models.encoder_config import BertConfig
from kgrec_jax.pretrained.hf import load_encoder
from kgrec_jax.stages import pretrain
from kgrec_jax.tracking import write_json
from kgrec_jax.workdir import differences

_FREE = ("mesh", "data.path", "log_every")  # what may differ when a run goes on; data are compared by content
_TABLES = (".jsonl", ".json", ".tsv")


@dataclasses.dataclass(frozen=True)
class ScratchConfig:
    """The shape of an encoder that begins at random, with a vocabulary learned from the training texts."""

    vocab_size: int = 2000  # word pieces at most
    hidden_size: int = 64  # width of the vectors
    num_hidden_layers: int = 2  # Transformer layers
    num_attention_heads: int = 4  # of each layer
    intermediate_size: int = 128  # width of the feed-forward halves
    hidden_dropout_prob: float = 0.1  # in training


@dataclasses.dataclass(frozen=True)
class FinetuneData:
    """Where the examples are."""

    # A folder with train and dev in CLUE's format; simcse: a dataset folder or a file with a text a line.
    path: str = ""
    made: Literal["none", "news-zh"] = "none"  # without a path: a set that the project makes itself
    made_train: int = 2400  # sentences of such a set to learn from
    made_dev: int = 480  # and to measure with
    valid_share: float = 0.1  # simcse: share of the texts that is held out


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Everything that a training needs beside its config."""

    config: BertConfig
    weights: dict
    tokenizer: Tokenizer
    train: Encoded
    dev: Encoded
    length: int  # of every batch
    classes: list[str]  # of classification
    mean: float  # of the training targets of regression
    scale: float  # their standard deviation

    def source(self, part: Literal["train", "dev"], steps: int, batch: int, seed: tuple[int, ...],
               cover: bool = False) -> ExampleSource:
        """Batches of one part."""
        data = self.train if part == "train" else self.dev
        return ExampleSource(data, self.tokenizer.pad_id, steps, batch, self.length, seed, cover)


def open_run(cfg: Any, workdir: pathlib.Path, version: int) -> dict | None:
    """The report of a finished run; None where there is something to do, in a new folder or one of the same config.

    KgrecError names the fields that differ from the folder's, or a folder that holds something else.
    """
    held, resolved = workdir / "finetune.json", to_json(cfg)
    if held.is_file():
        before = _json(held)
        changed = [d for d in differences(before.get("config"), resolved)
                   if not any(d == free or d.startswith(free + ".") for free in _FREE)]
        if changed and not (workdir / "training").exists():  # nothing was computed yet: another config may have it
            for made in ("made", "tokenizer"):
                shutil.rmtree(workdir / made, ignore_errors=True)
            write_json(held, {"format_version": version, "config": resolved})
        elif changed:
            raise KgrecError(f"{held}: found a run with another {', '.join(changed[:6])}, expected the same config; "
                             "choose another --workdir or the settings that it was begun with")
        report = workdir / "report.json"
        return _json(report) if report.is_file() else None
    if workdir.exists() and (not workdir.is_dir() or any(not p.name.startswith(".") for p in workdir.iterdir())):
        raise KgrecError(f"{workdir}: found something else there, expected a run of kgrec finetune or a new folder; "
                         "choose another --workdir")
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(held, {"format_version": version, "config": resolved})
    return None


def prepare(cfg: Any, workdir: pathlib.Path, say: Callable[[str], None]) -> Prepared:
    """Examples, encoder and tokenizer of a config; what is made for it is left in `workdir` and found there again."""
    train, dev = _examples(cfg, workdir)
    for note in (*train.notes, *dev.notes):
        say(f"note: {note}")
    _same_data(workdir, train, dev)
    classes, mean, scale = [], 0.0, 1.0
    targets = [np.zeros(len(part), np.float32) for part in (train, dev)]
    if cfg.task == "classification":
        classes = class_names(train)
        targets = [class_rows(part, classes) for part in (train, dev)]
    elif cfg.task == "regression":
        values = [np.array([float(label) for label in part.labels], np.float64) for part in (train, dev)]
        mean, scale = float(values[0].mean()), float(values[0].std())
        if not scale > 0:
            raise KgrecError(f"{train.path}: found the label {train.labels[0]} in every row, expected values that vary")
        targets = [((value - mean) / scale).astype(np.float32) for value in values]
    config, weights, tokenizer = _encoder(cfg, workdir, train, say)
    limit = min(cfg.length, config.max_position_embeddings)
    if cfg.peft.method == "prompt":
        limit = min(limit, config.max_position_embeddings - cfg.peft.prompt_length)
    known = coverage(tokenizer, [*train.first, *train.second])
    if known.reason:
        say(f"note: {known.reason}; an encoder of the texts' language will do better")
    encoded = [encode(part, cfg.task, tokenizer, limit, target)
               for part, target in zip((train, dev), targets, strict=True)]
    length = min(limit, -(-max(part.longest for part in encoded) // 8) * 8)
    return Prepared(config, weights, tokenizer, *encoded, length, classes, mean, scale)


def _examples(cfg: Any, workdir: pathlib.Path) -> tuple[Examples, Examples]:
    """Train and held-out examples."""
    if not cfg.data.path:
        if cfg.data.made == "none":
            raise KgrecError("--data.path: found none, expected a folder with train and dev in CLUE's format (simcse: "
                             "a dataset folder or a file with a text a line)")
        if cfg.task != "classification":
            raise KgrecError(f"task: found {cfg.task} for data.made={cfg.data.made}, expected classification")
        folder = workdir / "made"
        if not folder.is_dir():
            write_news(folder, train=cfg.data.made_train, dev=cfg.data.made_dev, seed=cfg.seed)
        parts = find_parts(folder)
    elif cfg.task == "simcse":
        return _held_out(_texts(cfg.data.path), cfg.data.valid_share, cfg.seed)
    else:
        is_path = not cfg.data.path.startswith(("pypi:", "hub:"))
        parts = find_parts(cfg.data.path if is_path else resolve(cfg.data.path))
    train, dev = (read_examples(parts[part], cfg.task) for part in ("train", "dev"))
    if bool(train.second) != bool(dev.second):
        raise KgrecError(f"{dev.path}: found {'pairs' if dev.second else 'single sentences'}, expected the fields of "
                         f"{train.path.name}")
    return train, dev


def _texts(source: str) -> Examples:
    path = pathlib.Path(source).expanduser()
    if path.is_file():
        return read_examples(path, "simcse") if path.suffix in _TABLES else read_lines(path)
    folder = pathlib.Path(resolve(source))
    texts = tuple(pretrain.texts_of(read_folder(folder)))
    if not texts:
        raise KgrecError(f"{folder}: found no text of an item or an entity, expected some; simcse learns from texts")
    return Examples(texts, (), (), tuple(range(1, len(texts) + 1)), folder)


def _held_out(texts: Examples, share: float, seed: int) -> tuple[Examples, Examples]:
    first = tuple(dict.fromkeys(texts.first))  # a text and its copy are no rivals
    held = max(2, int(share * len(first)))
    if len(first) - held < 2:
        raise KgrecError(f"{texts.path}: found {len(first)} distinct texts, expected at least 4")
    order = np.random.default_rng([seed, 19]).permutation(len(first))

    def part(rows: np.ndarray) -> Examples:
        return Examples(tuple(first[i] for i in np.sort(rows)), (), (), tuple(int(i) + 1 for i in np.sort(rows)),
                        texts.path)

    return part(order[held:]), part(order[:held])


def _encoder(cfg: Any, workdir: pathlib.Path, train: Examples,
             say: Callable[[str], None]) -> tuple[BertConfig, dict, Tokenizer]:
    if cfg.encoder != "scratch":
        encoder = load_encoder(cfg.encoder, say=say)
        return encoder.config, encoder.params, load_tokenizer(encoder.tokenizer_folder, encoder.config.vocab_size)
    shape, folder = cfg.scratch, workdir / "tokenizer"
    if not folder.is_dir():
        train_wordpiece([*train.first, *train.second], folder, shape.vocab_size)
    tokenizer = load_tokenizer(folder)
    positions = max(cfg.length + (cfg.peft.prompt_length if cfg.peft.method == "prompt" else 0), 16)
    config = BertConfig(tokenizer.vocab_size, shape.hidden_size, shape.num_hidden_layers, shape.num_attention_heads,
                        shape.intermediate_size, hidden_dropout_prob=shape.hidden_dropout_prob,
                        max_position_embeddings=positions, pad_token_id=tokenizer.pad_id)
    return config, encoders.init(config, jax.random.key(cfg.seed)), tokenizer


def _same_data(workdir: pathlib.Path, *parts: Examples) -> None:
    """KgrecError where a run goes on with other examples than it was begun with."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(json.dumps([part.first, part.second, part.labels], ensure_ascii=False).encode())
    held, found = workdir / "dataset.json", digest.hexdigest()
    begun = any((workdir / "training").glob("checkpoints/*"))
    if begun and held.is_file() and _json(held).get("hash") != found:
        raise KgrecError(f"data.path: found other examples than the run in {workdir} was begun with; choose another "
                         "--workdir")
    write_json(held, {"hash": found, "train": len(parts[0]), "dev": len(parts[1])})


def _json(path: pathlib.Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise KgrecError(f"{path}: found a damaged file ({error}), expected JSON that a run wrote; choose another "
                         "--workdir") from None
