"""Chinese text classification in CLUE's format: a set that is made on the spot, an encoder that begins at random.

CLUE's own files: kgrec finetune clue_style_zh --data.path tnews --encoder FOLDER --peft.method lora --workdir RUN
"""

from kgrec_jax.models.peft import PeftConfig
from kgrec_jax.optim import OptimConfig
from kgrec_jax.stages.finetune import FinetuneConfig
from kgrec_jax.stages.finetune_data import FinetuneData


def get_config() -> FinetuneConfig:
    return FinetuneConfig(
        name="clue-style-zh", task="classification", encoder="scratch", data=FinetuneData(made="news-zh"),
        peft=PeftConfig(method="full"), length=40, batch=32, epochs=4.0,
        optim=OptimConfig(peak_lr=2e-3), head_optim=OptimConfig(peak_lr=5e-3))
