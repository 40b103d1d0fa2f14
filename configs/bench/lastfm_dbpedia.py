"""Last.FM with DBpedia on CoLaKG's fixed split.

    KGREC_DATA=FOLDER kgrec run bench/lastfm_dbpedia --workdir RUN --seeds 3

The default experiment on the folder lastfm-dbpedia; a tenth of each user's train rows chooses hyper-parameters and is
given back.
"""

from kgrec_jax.config import Experiment
from kgrec_jax.data.folder import DataConfig


def get_config() -> Experiment:
    return Experiment(name="lastfm_dbpedia", data=DataConfig(path="$KGREC_DATA/lastfm-dbpedia"))
