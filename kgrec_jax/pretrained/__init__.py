"""Weights that others trained."""

from kgrec_jax.pretrained.export import save_encoder
from kgrec_jax.pretrained.hf import Encoder, load_encoder

__all__ = ["Encoder", "load_encoder", "save_encoder"]
