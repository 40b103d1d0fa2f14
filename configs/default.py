"""Any dataset folder: kgrec run configs/default.py --data.path FOLDER --workdir RUN."""

from kgrec_jax.config import Experiment


def get_config() -> Experiment:
    return Experiment(name="default")
