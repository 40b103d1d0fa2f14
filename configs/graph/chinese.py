"""A Chinese graph from nothing but itself: vocabulary, encoder, tables and bi-encoder are trained on its own words.

    kgrec graph configs/graph/chinese.py --data.path FOLDER --workdir RUN
"""

from kgrec_jax.config import Experiment
from kgrec_jax.optim import OptimConfig
from kgrec_jax.stages import graph, graph_bi_encoder, pretrain


def get_config() -> Experiment:
    return Experiment(
        name="chinese-graph",
        pretrain=pretrain.Config(
            mode="scratch", rows="packed",
            shape=pretrain.Shape(vocab_size=4000, hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
                                 intermediate_size=512, max_position_embeddings=128),
            steps=600, batch=32, length=64, log_every=50, checkpoint_every=200,
            optim=OptimConfig(peak_lr=2e-3, warmup_share=0.05, weight_decay=0.01, b2=0.98)),
        graph=graph.Config(
            dim=256, steps=1500, n3=0.05, encoder_mode="lora", text_eval=0, text_length=64,
            bi_encoder=graph_bi_encoder.Config(mode="full", batch=64, steps=400, length=64,
                                               optim=OptimConfig(peak_lr=1e-3, schedule="linear", warmup_share=0.05))))
