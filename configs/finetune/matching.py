"""Pairs of texts that belong together: kgrec finetune matching --data.path FOLDER --workdir RUN."""

from kgrec_jax.stages.finetune import FinetuneConfig


def get_config() -> FinetuneConfig:
    return FinetuneConfig(name="matching", task="matching", batch=32, length=64)
