"""MovieLens-100K with DBpedia: the items of cold_items.txt, which nobody has touched, among themselves.

    KGREC_DATA=FOLDER kgrec run bench/ml100k_cold --workdir RUN --seeds 3

The default experiment on the folder ml100k-dbpedia.
"""

from kgrec_jax.config import Experiment
from kgrec_jax.data.folder import DataConfig
from kgrec_jax.data.interactions import SplitConfig


def get_config() -> Experiment:
    return Experiment(
        name="ml100k_cold",
        data=DataConfig(path="$KGREC_DATA/ml100k-dbpedia",
                        split=SplitConfig(kind="cold-items", items="cold_items.txt")))
