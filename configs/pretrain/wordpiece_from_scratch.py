"""A vocabulary and a small BERT from nothing but texts, in about ten minutes on two cores:

    kgrec pretrain configs/pretrain/wordpiece_from_scratch.py --pretrain.corpus TEXTS… --workdir RUN
    kgrec pretrain configs/pretrain/wordpiece_from_scratch.py --data.path FOLDER --workdir RUN
"""

from kgrec_jax.config import Experiment
from kgrec_jax.optim import OptimConfig
from kgrec_jax.stages import pretrain


def get_config() -> Experiment:
    return Experiment(
        name="wordpiece-from-scratch",
        pretrain=pretrain.Config(
            mode="scratch", rows="packed", masking="word",
            shape=pretrain.Shape(vocab_size=8000, hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
                                 intermediate_size=512, max_position_embeddings=128),
            steps=3000, batch=32, length=64, valid_share=0.02, valid_limit=256, ema=0.995, eval_every=250,
            log_every=50, checkpoint_every=200,
            optim=OptimConfig(peak_lr=3e-3, warmup_share=0.05, weight_decay=0.01, b2=0.98)))
