"""The names that each family's checkpoints give to the weights of our trees, read in both directions."""

from __future__ import annotations

import dataclasses
import re

import numpy as np

WORDS = "embeddings/word_embeddings/embedding"
_TRANSFORM, _BIAS, _DECODER = "cls/predictions/transform", "cls/predictions/bias", "cls/predictions/decoder"


@dataclasses.dataclass(frozen=True)
class Family:
    """How the checkpoints of one architecture spell our tree."""

    prefix: str  # before every name of the body, where there is a head beside it
    pairs: tuple[tuple[str, str], ...] = ()  # (theirs, ours): parts of a path, exchanged in this order either way
    set_aside: str = r"(?!)"  # read, and left out: no hidden state and no logit depends on them
    tied: tuple[tuple[str, str], ...] = ()  # (copy, original): a checkpoint may hold either of the two, or both
    conv: str = r"(?!)"  # kernels of torch's Conv1D, [in, out] where nn.Linear has [out, in]


_BERT_TIED = ((f"{_DECODER}/kernel", WORDS), (f"{_DECODER}/bias", _BIAS))
_ROBERTA = Family("roberta", (
    ("lm_head/dense", f"{_TRANSFORM}/dense"), ("lm_head/layer_norm", f"{_TRANSFORM}/LayerNorm"),
    ("lm_head/decoder", _DECODER), ("lm_head/bias", _BIAS)),
    r"^(pooler/dense/(kernel|bias)|embeddings/(position_ids|token_type_ids))$", _BERT_TIED)
FAMILIES = {
    "bert": Family("bert", (), r"^(pooler/dense/(kernel|bias)|cls/seq_relationship/(kernel|bias)|"
                               r"embeddings/(position_ids|token_type_ids))$", _BERT_TIED),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    # attention/output/dense ends like output/dense: what stands first is exchanged first.
    "distilbert": Family("distilbert", (
        ("transformer/layer", "encoder/layer"), ("attention/q_lin", "attention/self/query"),
        ("attention/k_lin", "attention/self/key"), ("attention/v_lin", "attention/self/value"),
        ("attention/out_lin", "attention/output/dense"), ("sa_layer_norm", "attention/output/LayerNorm"),
        ("ffn/lin1", "intermediate/dense"), ("ffn/lin2", "output/dense"), ("output_layer_norm", "output/LayerNorm"),
        ("vocab_transform", f"{_TRANSFORM}/dense"), ("vocab_layer_norm", f"{_TRANSFORM}/LayerNorm"),
        ("vocab_projector/kernel", f"{_DECODER}/kernel"), ("vocab_projector/bias", _BIAS)),
        r"^embeddings/position_ids$", _BERT_TIED),
    "gpt2": Family("transformer", (), r"^h/\d+/attn/(bias|masked_bias)$", (("lm_head/kernel", "wte/embedding"),),
                   r"(^|/)(c_attn|c_proj|c_fc)/kernel$"),
}
_NORMS = re.compile(r"^(LayerNorm|\w*layer_norm|ln_\w+)$")
_TABLES = re.compile(r"^(\w+_embeddings|wte|wpe)$")


def torch_name(name: str) -> str:
    """Flax path of a torch parameter name, by Hugging Face's rules (LayerNorm gamma/beta of old files too)."""
    parts = name.split(".")
    last, owner = parts[-1], parts[-2] if len(parts) > 1 else ""
    if _NORMS.match(owner):
        last = {"weight": "scale", "gamma": "scale", "beta": "bias"}.get(last, last)
    elif last == "weight":
        last = "embedding" if _TABLES.match(owner) else "kernel"
    return "/".join([*parts[:-1], last])


def to_ours(kind: str, path: str) -> str:
    """Our path of a weight that a checkpoint of model type `kind` names by this Flax path."""
    family = FAMILIES[kind]
    path = path.removeprefix(family.prefix + "/")
    for theirs, ours in family.pairs:
        path = _exchanged(path, theirs, ours)
    return path


def to_theirs(kind: str, path: str) -> str:
    """The Flax path without prefix that checkpoints of model type `kind` give to our path."""
    for theirs, ours in FAMILIES[kind].pairs:
        path = _exchanged(path, ours, theirs)
    return path


def from_torch(kind: str, name: str, value: np.ndarray) -> tuple[str, np.ndarray]:
    """(Flax path, array with kernels [in, out]) of a torch parameter."""
    path = torch_name(name)
    linear = path.endswith("/kernel") and not re.search(FAMILIES[kind].conv, path)
    return path, value.T if linear and value.ndim == 2 else value


def from_flax(kind: str, path: str, value: np.ndarray) -> tuple[str, np.ndarray]:
    """(Flax path, array with kernels [in, out]) of a Flax parameter: Hugging Face's Flax Conv1D has [out, in]."""
    return path, value.T if re.search(FAMILIES[kind].conv, path) and value.ndim == 2 else value


def to_torch(kind: str, path: str, value: np.ndarray, with_head: bool) -> tuple[str, np.ndarray]:
    """(torch parameter name, array in torch's layout) of our weight; no prefix where the body is all there is."""
    family = FAMILIES[kind]
    *parents, leaf = to_theirs(kind, path).split("/")
    if leaf == "kernel" and not re.search(family.conv, path):
        value = value.T
    name = ".".join([*parents, {"bias": "bias"}.get(leaf, "weight")])
    is_body = not path.startswith("cls/")
    return f"{family.prefix}.{name}" if with_head and is_body else name, value


def _exchanged(path: str, old: str, new: str) -> str:
    """`path` with whole names exchanged, never a part of one."""
    return f"/{path}/".replace(f"/{old}/", f"/{new}/", 1)[1:-1]
