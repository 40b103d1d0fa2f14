"""What config.json says of an encoder, family by family, and which of its fields must have one value only."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from kgrec_jax.errors import KgrecError
from kgrec_jax.models.layers import gelu

ACTIVATIONS = {
    "gelu": gelu,
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}

# Fields of config.json that would change the function if they had another value than this one.
FIXED_FIELDS = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
    "pruned_heads": {},
    "quantization_config": None,
}
_KINDS = {"int": int, "float": (int, float), "str": str, "bool": bool}
_AT_LEAST_ZERO = {"pad_token_id", "position_offset", "type_vocab_size"}

# Our field -> theirs, where the two differ; the value that Hugging Face means by an absent field, where ours differs.
_DISTILBERT = {"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
               "intermediate_size": "hidden_dim", "hidden_act": "activation", "hidden_dropout_prob": "dropout",
               "attention_probs_dropout_prob": "attention_dropout"}
_GPT2 = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
         "intermediate_size": "n_inner", "hidden_act": "activation_function", "max_position_embeddings": "n_positions",
         "embedding_dropout_prob": "embd_pdrop", "hidden_dropout_prob": "resid_pdrop",
         "attention_probs_dropout_prob": "attn_pdrop", "layer_norm_eps": "layer_norm_epsilon"}
_ROBERTA_ABSENT = {"vocab_size": 50265, "pad_token_id": 1}
_ABSENT = {"bert": {}, "roberta": _ROBERTA_ABSENT, "xlm-roberta": _ROBERTA_ABSENT,
           "distilbert": {"num_hidden_layers": 6}, "gpt2": {}}
_RENAMED = {"distilbert": _DISTILBERT, "gpt2": _GPT2}
MODEL_TYPES = tuple(_ABSENT)


def _check(config: Any) -> None:
    """KgrecError for a field of a config that has no sense, by the name that its config.json gives it."""
    names = _RENAMED.get(config.model_type, {})
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), names.get(field.name, field.name)
        is_kind = isinstance(value, _KINDS[field.type]) and isinstance(value, bool) == (field.type == "bool")
        if not is_kind:
            raise KgrecError(f"config.json: {name}: found {value!r}, expected a value of type {field.type}")
        lowest = 0 if field.type == "float" or field.name in _AT_LEAST_ZERO else 1
        if field.type in ("int", "float") and value < lowest:
            raise KgrecError(f"config.json: {name}: found {value!r}, expected at least {lowest}")
    if config.hidden_act not in ACTIVATIONS:
        raise KgrecError(f"config.json: {names.get('hidden_act', 'hidden_act')}: found {config.hidden_act!r}, "
                         f"expected one of {', '.join(ACTIVATIONS)}")
    if config.hidden_size % config.num_attention_heads:
        raise KgrecError(f"config.json: {names.get('num_attention_heads', 'num_attention_heads')}: found "
                         f"{config.num_attention_heads}, expected a divisor of "
                         f"{names.get('hidden_size', 'hidden_size')} {config.hidden_size}")


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The fields that define the function of a BERT, a RoBERTa or a DistilBERT; defaults are Hugging Face's BERT."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512  # the longest text; the table has position_offset rows more
    type_vocab_size: int = 2  # 0: no token types
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    pad_token_id: int = 0  # no effect on the function: the mask decides what is padding
    position_offset: int = 0  # rows of the position table before the first token's; RoBERTa: the padding's id + 1
    model_type: str = "bert"  # whose names config.json and the weights have: bert, roberta, xlm-roberta, distilbert

    def __post_init__(self) -> None:
        if self.model_type not in MODEL_TYPES or self.model_type == "gpt2":
            raise _other_architecture(self.model_type)
        _check(self)

    @property
    def head_act(self) -> str:
        """The activation of the masked-LM head, which RoBERTa keeps whatever its layers have."""
        return "gelu" if "roberta" in self.model_type else self.hidden_act

    @staticmethod
    def from_hf(fields: dict[str, Any]) -> BertConfig:
        """The config of a parsed config.json; a field that asks for another function is refused by name."""
        values = _read(BertConfig, {"model_type": "bert"} | fields)
        if "roberta" in values["model_type"]:
            padding, rows = values["pad_token_id"], values.get("max_position_embeddings", 512)
            if isinstance(padding, int) and isinstance(rows, int):  # else __post_init__ names the field
                values |= {"position_offset": padding + 1, "max_position_embeddings": rows - padding - 1}
        if values["model_type"] == "distilbert":
            values |= {"type_vocab_size": 0, "layer_norm_eps": 1e-12}
        return BertConfig(**values)

    def to_hf(self, with_head: bool = True) -> dict[str, Any]:
        """The config.json of this encoder, in the names of its family."""
        values = dataclasses.asdict(self)
        values["max_position_embeddings"] += values.pop("position_offset")
        if self.model_type == "distilbert":
            values = {k: v for k, v in values.items() if k not in ("type_vocab_size", "layer_norm_eps")}
        return _written(self.model_type, values, with_head)


@dataclasses.dataclass(frozen=True)
class GptConfig:
    """The fields that define the function of a GPT-2; defaults are Hugging Face's."""

    vocab_size: int = 50257
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072  # n_inner; 4 · n_embd where config.json has null
    hidden_act: str = "gelu_new"
    embedding_dropout_prob: float = 0.1
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 1024
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True  # divide the scores by √(head width)
    scale_attn_by_inverse_layer_idx: bool = False  # and by the layer's number from 1
    reorder_and_upcast_attn: bool = False  # a matter of rounding: the softmax is in float32 either way
    model_type: str = "gpt2"

    def __post_init__(self) -> None:
        if self.model_type != "gpt2":
            raise _other_architecture(self.model_type)
        _check(self)

    @staticmethod
    def from_hf(fields: dict[str, Any]) -> GptConfig:
        """The config of a parsed config.json; a field that asks for another function is refused by name."""
        values = _read(GptConfig, fields)
        width = values.get("hidden_size", GptConfig.hidden_size)
        if "intermediate_size" not in values and isinstance(width, int):
            values["intermediate_size"] = 4 * width
        return GptConfig(**values)

    def to_hf(self, with_head: bool = True) -> dict[str, Any]:
        """The config.json of this encoder, in GPT-2's names."""
        return _written("gpt2", dataclasses.asdict(self), with_head)


EncoderConfig = BertConfig | GptConfig
ARCHITECTURES = {  # without and with a head
    "bert": ("BertModel", "BertForMaskedLM"), "roberta": ("RobertaModel", "RobertaForMaskedLM"),
    "xlm-roberta": ("XLMRobertaModel", "XLMRobertaForMaskedLM"),
    "distilbert": ("DistilBertModel", "DistilBertForMaskedLM"), "gpt2": ("GPT2Model", "GPT2LMHeadModel")}


def from_hf(fields: dict[str, Any]) -> EncoderConfig:
    """The config of a parsed config.json of any family that is known here (a file without model_type is a BERT's)."""
    kind = fields.get("model_type", "bert")
    if kind not in MODEL_TYPES:
        raise _other_architecture(kind)
    return GptConfig.from_hf(fields) if kind == "gpt2" else BertConfig.from_hf(fields)


def _other_architecture(kind: Any) -> KgrecError:
    return KgrecError(f"config.json: model_type: found {kind!r}, expected one of {', '.join(MODEL_TYPES)}; take a "
                      "checkpoint of one of these architectures")


def _read(cls: type, fields: dict[str, Any]) -> dict[str, Any]:
    """Our fields of a config.json, absent ones left out unless the family's default is another than ours."""
    kind = fields["model_type"]
    for name, only in FIXED_FIELDS.items():
        found = fields.get(name, only)
        if found != only and (found or only):  # null, {} and false say the same here
            raise KgrecError(f"config.json: {name}: found {found!r}, expected {only!r}; encoders here have absolute "
                             "positions, tied word embeddings and no cross-attention")
    names = _RENAMED.get(kind, {})
    ours = [f.name for f in dataclasses.fields(cls) if f.name != "position_offset"]
    found = {name: fields[names.get(name, name)] for name in ours if fields.get(names.get(name, name)) is not None}
    return {**_ABSENT[kind], **found}


def _written(kind: str, values: dict[str, Any], with_head: bool) -> dict[str, Any]:
    names = _RENAMED.get(kind, {})
    return {"architectures": [ARCHITECTURES[kind][with_head]],
            **{names.get(name, name): value for name, value in values.items()}, "dtype": "float32"}


def layer_weights(config: Any) -> int:
    """Weights of all layers' matrices, by which the time of a token goes."""
    width, wide = config.hidden_size, config.intermediate_size
    return config.num_hidden_layers * (4 * width**2 + 2 * width * wide)


# All-MiniLM-L6-v2, the default encoder, on which the speeds of the estimates were measured.
MINILM_WEIGHTS = layer_weights(BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536))
