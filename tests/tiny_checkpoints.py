"""Checkpoint folders of RoBERTa, DistilBERT and GPT-2 with random weights, each with a tokenizer of its family."""

import pathlib
import shutil

from tiny_encoder import ORACLE
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from kgrec_jax.data.text import train_wordpiece

SIZES = {"roberta": 120, "distilbert": 130, "gpt2": 140}


def byte_level(texts: list[str], vocab_size: int, special: list[str]) -> Tokenizer:
    """A byte-level BPE of the characters of `texts`."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special,
                                                           show_progress=False))
    return backend


def make_checkpoint(kind: str, folder: pathlib.Path, texts: list[str]) -> pathlib.Path:
    """Writes tokenizer files, config.json and model.safetensors into the new `folder`."""
    if kind == "distilbert":
        train_wordpiece(texts, folder, SIZES[kind])
    elif kind == "roberta":
        backend = byte_level(texts, SIZES[kind], ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
        backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
        names = {"bos": "<s>", "cls": "<s>", "eos": "</s>", "sep": "</s>", "pad": "<pad>", "unk": "<unk>",
                 "mask": "<mask>"}
        PreTrainedTokenizerFast(tokenizer_object=backend, **{f"{name}_token": token for name, token in names.items()}
                                ).save_pretrained(str(folder))
    else:
        backend = byte_level(texts, SIZES[kind], ["<|endoftext|>"])
        PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|endoftext|>",
                                unk_token="<|endoftext|>").save_pretrained(str(folder))
    for name in ("config.json", "model.safetensors"):
        shutil.copy(ORACLE / kind / name, folder / name)
    return folder
