"""What the pretraining stage trains, and for how long."""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

from kgrec_jax.errors import KgrecError
from kgrec_jax.models.encoder_config import BertConfig, EncoderConfig, GptConfig
from kgrec_jax.optim import OptimConfig
from kgrec_jax.stages.bounds import check_bounds

MAX_HEAD_STEPS, MAX_STEPS = 24, 36
TOKENS_PER_SECOND = 1000.0  # of a small encoder's training on two cores


@dataclasses.dataclass(frozen=True)
class Shape:
    """An encoder that is trained from scratch, with a vocabulary of its own."""

    vocab_size: int = 8000  # word pieces to learn at most
    lower_case: Literal["yes", "no"] = "yes"  # of the vocabulary
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    intermediate_size: int = 512
    max_position_embeddings: int = 128
    initializer_range: float = 0.02  # standard deviation of fresh weights
    dropout: float = 0.0  # a small encoder of a small corpus is cut off by its budget, not by overfitting

    def encoder(self, vocab_size: int, causal: bool = False) -> EncoderConfig:
        """The configuration of a BERT, or of a GPT; KgrecError for a field out of bounds."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)
                  if f.name not in ("vocab_size", "lower_case", "dropout")}
        fields |= {"embedding_dropout_prob": self.dropout} if causal else {}
        try:
            return (GptConfig if causal else BertConfig)(
                vocab_size=vocab_size, hidden_dropout_prob=self.dropout, attention_probs_dropout_prob=self.dropout,
                **fields)
        except KgrecError as error:
            raise KgrecError(re.sub(r"config\.json: (\w+)", lambda found: "pretrain.shape." + _OURS.get(
                found[1], found[1]), str(error), count=1)) from None


# A GPT's config names its fields in its own way.
_OURS = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
         "n_inner": "intermediate_size", "n_positions": "max_position_embeddings"}


@dataclasses.dataclass(frozen=True)
class Config:
    """What the pretraining stage trains and for how long; 0 steps: from the number of texts."""

    # off: the encoder stays as it was released, without a masked-LM head; lora: adapters, merged at the end;
    # full: all of its weights; scratch: a new encoder of the given shape with a vocabulary of its own
    mode: Literal["lora", "full", "scratch", "off"] = "lora"
    # masked: hidden tokens from both sides; causal: the next token; auto: what the encoder is, from scratch masked
    objective: Literal["auto", "masked", "causal"] = "auto"
    corpus: tuple[str, ...] = ()  # files and folders of texts (.txt, .jsonl, .parquet, .tsv …); none: the data set's
    rows: Literal["texts", "buckets", "packed"] = "texts"  # a text a row; the same, by length; texts one after another
    # token: each hidden alone; word: all pieces of a word; segment: also Chinese characters with no blank between them
    masking: Literal["token", "word", "segment"] = "token"
    shape: Shape = Shape()  # scratch: of the encoder
    head_steps: int = 0  # steps of a fresh head alone; 0: four passes over the texts, at most 24
    steps: int = 0  # steps of the training; 0: four passes over the texts, with lora at most 36
    batch: int = 32  # texts of a step (of a part of it, where it has several)
    accumulate: int = 1  # parts of a step, whose gradients are added up
    length: int = 32  # tokens of a text in a step; a longer text gives a window
    mask_share: float = 0.15  # of the tokens
    valid_share: float = 0.1  # of the texts, held out for the figures of done.json
    valid_limit: int = 256  # texts held out at most
    lora_rank: int = 8  # rank of the adapters
    lora_alpha: float = 16.0  # the adapters' product counts alpha / rank
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; weights and sums are float32
    remat: Literal["off", "on"] = "off"  # on: of a layer only its input is kept, the rest is computed again
    ema: float = 0.0  # decay of a moving average of the weights, which is evaluated and handed on; 0: none
    head_optim: OptimConfig = OptimConfig(peak_lr=3e-3)  # of the head alone
    optim: OptimConfig = OptimConfig(peak_lr=3e-4)  # of everything that is trained after it
    eval_every: int = 0  # steps between two evaluations; 0: at the end, and ten on the way of a corpus, full or scratch
    log_every: int = 10  # steps between two rows of metrics.jsonl
    checkpoint_every: int = 20  # steps between two checkpoints

    @property
    def needs_dataset(self) -> bool:
        """Whether the texts are those of the data set."""
        return not self.corpus

    @property
    def told(self) -> bool:
        """Whether the way of the figures is worth showing: where training is more than a short adaptation."""
        return bool(self.corpus) or self.eval_every > 0 or self.mode in ("full", "scratch")


@dataclasses.dataclass(frozen=True)
class Plan:
    """The steps that follow from the number of texts, and about how long they take on two cores."""

    head_steps: int
    steps: int
    seconds: float


def make_plan(cfg: Config, num_texts: int, has_head: bool) -> Plan:
    """Steps of both trainings for so many texts (or packed rows); KgrecError for a field out of bounds."""
    check(cfg)
    four_passes = max(-(-4 * num_texts // (cfg.batch * cfg.accumulate)), 4)
    head_steps = 0 if has_head or cfg.mode == "scratch" else cfg.head_steps or min(four_passes, MAX_HEAD_STEPS)
    steps = cfg.steps or (min(four_passes, MAX_STEPS) if cfg.mode == "lora" else four_passes)
    tokens = cfg.batch * cfg.accumulate * cfg.length
    return Plan(head_steps, steps, 10 + tokens * (steps + head_steps / 2) / TOKENS_PER_SECOND)


def check(cfg: Config, config: EncoderConfig | None = None) -> None:
    """KgrecError naming the first field that no training can do anything with, of this encoder if it is given."""
    many = 1 << 20
    if cfg.mode == "scratch":
        config = config or cfg.shape.encoder(cfg.shape.vocab_size, cfg.objective == "causal")
    bounds = {"length": (3, config.max_position_embeddings if config else many),
              "lora_rank": (1, config.hidden_size if config else many), "batch": (1, many), "mask_share": (1e-6, 0.99),
              "valid_share": (0.0, 0.9), "valid_limit": (0, many), "head_steps": (0, many), "steps": (0, many),
              "accumulate": (1, many), "ema": (0.0, 0.999999), "eval_every": (0, many)}
    if cfg.mode != "lora":
        del bounds["lora_rank"]
    if config and cfg.objective not in ("auto", "causal" if isinstance(config, GptConfig) else "masked"):
        raise KgrecError(f"pretrain.objective: found {cfg.objective} with an encoder of type {config.model_type}, "
                         "expected causal for gpt2 and masked for the others; auto takes what fits")
    check_bounds("pretrain", cfg, bounds)
    if cfg.mode == "scratch" and not (6 <= cfg.shape.vocab_size <= many and 0.0 <= cfg.shape.dropout < 1.0):
        raise KgrecError(f"pretrain.shape: found vocab_size {cfg.shape.vocab_size} and dropout {cfg.shape.dropout}, "
                         f"expected 6 to {many} and 0 to below 1")
