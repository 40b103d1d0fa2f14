"""MovieTweetings with DBpedia: the items of cold_items.txt, which nobody has touched, among themselves.

    KGREC_DATA=FOLDER kgrec run bench/movietweetings_cold --workdir RUN --seeds 3

The default experiment on the folder movietweetings-10core.
"""

from kgrec_jax.config import Experiment
from kgrec_jax.data.folder import DataConfig
from kgrec_jax.data.interactions import SplitConfig


def get_config() -> Experiment:
    return Experiment(
        name="movietweetings_cold",
        data=DataConfig(path="$KGREC_DATA/movietweetings-10core",
                        split=SplitConfig(kind="cold-items", items="cold_items.txt")))
