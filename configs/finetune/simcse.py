"""Sentence vectors from texts alone (Gao et al. 2021): kgrec finetune simcse --data.path FOLDER --workdir RUN."""

from kgrec_jax.optim import OptimConfig
from kgrec_jax.stages.finetune import FinetuneConfig


def get_config() -> FinetuneConfig:
    return FinetuneConfig(name="simcse", task="simcse", temperature=0.05, batch=32, length=32, epochs=1.0,
                          optim=OptimConfig(peak_lr=3e-4))
