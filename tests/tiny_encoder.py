"""A BERT of three narrow layers with random weights and a tokenizer of the given texts, as a checkpoint folder."""

import json
import pathlib
import shutil

import numpy as np
from safetensors.numpy import save_file

from kgrec_jax.data.text import train_wordpiece

ORACLE = pathlib.Path(__file__).parent / "fixtures" / "hf-oracle"


def make_tiny_encoder(folder: pathlib.Path, texts: list[str], vocab_size: int = 211,
                      kind: str = "torch-model") -> pathlib.Path:
    """Writes tokenizer files, config.json and model.safetensors into the new `folder`."""
    train_wordpiece(texts, folder, vocab_size)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(ORACLE / kind / name, folder / name)
    return folder


def write_checkpoint(folder: pathlib.Path, config: dict, weights: dict[str, np.ndarray]) -> pathlib.Path:
    """Writes config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: np.ascontiguousarray(value) for name, value in weights.items()}, folder / "model.safetensors")
    return folder
