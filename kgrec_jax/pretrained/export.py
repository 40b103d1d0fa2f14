"""Our weights as a Hugging Face folder that torch transformers loads: config.json, model.safetensors, tokenizer.

Every family is written in its own layout and names: a BERT as BertForMaskedLM (or BertModel without a head), likewise
RoBERTa, XLM-RoBERTa and DistilBERT; a GPT-2 as GPT2LMHeadModel. Tied copies are left out, as transformers leaves them
out of its own files. There is no pooler: no stage trains one.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np

from kgrec_jax.errors import KgrecError
from kgrec_jax.models import encoders
from kgrec_jax.models.encoder_config import from_hf
from kgrec_jax.pretrained import files, names
from kgrec_jax.pretrained.hf import Encoder, check_fit, leaves, load_encoder, read_config

# The stages that may leave an encoder, the latest first; "released" is the one that the run began with.
STAGES = ("graph", "pretrain", "released")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
              "vocab.json", "merges.txt", "sentencepiece.bpe.model")
_LEFT = "what the run left beside its encoder"
# What a config.json says of the file that it came with and not of the function.
_NOT_OURS = {"torch_dtype", "transformers_version", "_name_or_path", "auto_map"}


def export_run(run: str | Path, out: str | Path, stage: str = "", say: Callable[[str], None] = print) -> Encoder:
    """Writes the encoder of a run to the new folder `out`, and returns it.

    `stage` is one of STAGES; "" takes the latest stage that left an encoder, and the only one of a fine-tuning.
    KgrecError where there is none, where RUN is no run or `out` exists.
    """
    run, out = Path(run).expanduser(), new_folder(out)
    if stage and stage not in STAGES:
        raise KgrecError(f"--stage: found {stage!r}, expected one of {', '.join(STAGES)}")
    encoder = (_finetuned if (run / "finetune.json").is_file() else _of_stage)(run, stage, say)
    save_encoder(encoder, out, tokenizer=True)
    return encoder


def save_encoder(encoder: Encoder, out: str | Path, tokenizer: bool = True) -> Path:
    """Writes `encoder` to the new folder `out`, whole or not at all; `tokenizer`: with its tokenizer's files.

    `load_encoder` reads the same weights back, bit for bit. KgrecError where `out` exists or a weight is not finite.
    """
    out, config = new_folder(out), encoder.config
    kind, head = config.model_type, encoders.has_head(config, encoder.params)
    flat = {}
    for path, leaf in leaves(encoder.params).items():
        name, value = names.to_torch(kind, path, np.asarray(leaf), head)
        flat[name] = files.as_float32(value, name, "the encoder")
    temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex}")
    try:
        temporary.mkdir(parents=True)
        text = json.dumps(_fields_beside(encoder.tokenizer_folder, kind) | config.to_hf(head), indent=2, sort_keys=True)
        (temporary / "config.json").write_text(text + "\n", encoding="utf-8")
        _write_safetensors(temporary / "model.safetensors", flat)
        if tokenizer:
            _write_tokenizer(encoder.tokenizer_folder, temporary)
        os.rename(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def new_folder(out: str | Path) -> Path:
    """The path of a folder that does not exist yet; KgrecError where something is there."""
    out = Path(out).expanduser()
    if out.exists() or out.is_symlink():
        raise KgrecError(f"OUT: found an existing {'folder' if out.is_dir() else 'file'} at {out}, expected a new "
                         "folder; nothing is overwritten")
    return out


def _of_stage(run: Path, stage: str, say: Callable[[str], None]) -> Encoder:
    """The encoder that a stage of a run left."""
    from kgrec_jax import workdir

    source = workdir.read_experiment_json(run)["config"].get("encoder", "")
    left = [name for name in STAGES[:-1] if (run / name / "encoder").is_dir()]
    if (stage or "released") not in (*left, "released"):
        raise KgrecError(f"{run}: found no encoder of the stage {stage} (it has not run, or left the encoder as it "
                         f"was), expected --stage {' or '.join([*left, 'released'])}")
    if not stage and not left:
        raise KgrecError(f"{run}: found no stage that left an encoder, expected one of {', '.join(STAGES[:-1])}; "
                         "--stage released writes the one that the run began with")
    if stage == "released":
        return load_encoder(source, say=say)
    return _left(run / "pretrain", run / (stage or left[0]) / "encoder", source, say)


def _finetuned(run: Path, stage: str, say: Callable[[str], None]) -> Encoder:
    """The encoder that a fine-tuning left, without its head."""
    if stage:
        raise KgrecError(f"--stage: found {stage}, expected none; {run} is a fine-tuning and holds one encoder")
    if not (run / "encoder").is_dir() or not (run / "encoder.json").is_file():
        raise KgrecError(f"{run}: found no encoder, expected the one that a fine-tuning leaves at its end; finish it, "
                         "or choose a method whose parts can be merged into the weights (lora, bitfit, full)")
    return _left(run, run / "encoder", str(files.read_json(run / "encoder.json", _LEFT).get("source", "")), say)


def _left(beside: Path, weights_at: Path, source: str, say: Callable[[str], None]) -> Encoder:
    """Weights with the config and the tokenizer `beside` them, else with those of the source that they began as."""
    from kgrec_jax import checkpoint

    about, own = beside / "encoder.json", beside / "tokenizer"
    folder = own if own.is_dir() else _source_folder(source, say)
    fields = files.read_json(about, _LEFT).get("config") if about.is_file() else None
    config = from_hf(fields) if isinstance(fields, dict) else read_config(folder)
    weights = checkpoint.load_tree(weights_at)
    has_head = "cls" in weights
    check_fit(config, {name: leaf.shape for name, leaf in leaves(weights).items()}, has_head, str(weights_at),
              "the training has parts that a plain encoder has no place for, or the encoder was exchanged")
    return Encoder(config, weights, has_head, folder)


def _source_folder(source: str, say: Callable[[str], None]) -> Path:
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    from kgrec_jax.data.sources import resolve

    return resolve(source, say=say)


def _fields_beside(folder: Path, kind: str) -> dict:
    """What the original config.json says beside what we know: special token ids and the like."""
    file = folder / "config.json"
    fields = files.read_json(file, "a Hugging Face config.json") if file.is_file() else {}
    same = fields.get("model_type", "bert") == kind
    return {name: value for name, value in fields.items() if name not in _NOT_OURS} if same else {}


def _write_safetensors(path: Path, flat: dict[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    save_file(flat, path, metadata={"format": "pt"})  # transformers refuses a file that does not say so
    path.chmod(0o666 & ~_umask())  # safetensors gives its owner alone the right to read


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _write_tokenizer(folder: Path, out: Path) -> None:
    """The tokenizer's own files; one that has only a vocabulary is written as tokenizer.json."""
    if (folder / "tokenizer.json").is_file():
        for name in _TOKENIZER:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, out / name)
        return
    from kgrec_jax.data.text import load_tokenizer

    load_tokenizer(folder).backend.save_pretrained(str(out))


def describe(encoder: Encoder) -> str:
    """One line of what was written."""
    count = sum(int(np.prod(leaf.shape)) for leaf in leaves(encoder.params).values())
    head = encoders.has_head(encoder.config, encoder.params)
    name = encoder.config.to_hf(head)["architectures"][0]
    return f"{name} of {count:,} weights"
