"""A number of each text or pair of texts: kgrec finetune regression --data.path FOLDER --workdir RUN."""

from kgrec_jax.stages.finetune import FinetuneConfig


def get_config() -> FinetuneConfig:
    return FinetuneConfig(name="regression", task="regression", batch=32, length=64)
