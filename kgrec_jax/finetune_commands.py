"""The door `kgrec finetune`: a config of configs/finetune or of a file, and its fields as arguments."""

from __future__ import annotations

import pathlib
from typing import Any

from kgrec_jax.errors import KgrecError

_HELP = """Tune an encoder for a task: classification, matching, regression, or contrast without labels (simcse).

  kgrec finetune clue_style_zh --workdir RUN                      a small Chinese set that is made on the spot
  kgrec finetune clue_style_zh --data.path tnews --workdir RUN    CLUE's own files, or your own in its format
  kgrec finetune simcse --data.path FOLDER --workdir RUN          from the texts of a dataset folder or a file

CONFIG is a file with get_config() -> FinetuneConfig, or a shipped one: {shipped}. Any field can be overridden by
--FIELD VALUE (--peft.method adalora); `kgrec finetune CONFIG --help` lists them all. A folder has train and dev as
.json(l) ({{"sentence", "label"}} or {{"sentence1", "sentence2", "label"}}, one object a line) or .tsv with a header.
RUN is left with report.json, training/, model/ and, where the method can be merged, encoder/. The same command on the
same RUN goes on where it stopped.
"""


def finetune(argv: list[str], workdir: str) -> int:
    """`kgrec finetune CONFIG --workdir RUN`; KgrecError for arguments, a config or examples that cannot be read."""
    if not argv or argv[0] in ("-h", "--help"):
        if argv:
            print(_HELP.format(shipped=", ".join(shipped())), end="")
            return 0
        raise KgrecError("CONFIG: found none, expected a config first: kgrec finetune CONFIG --workdir RUN; see "
                         "kgrec finetune --help")
    from kgrec_jax import commands

    cfg = commands.overridden(load(argv[0]), argv[1:], f"kgrec finetune {argv[0]}",
                               "Tune an encoder for a task; kgrec finetune --help says what RUN is left with.")
    if cfg is None:
        return 0
    if not workdir:
        raise KgrecError("--workdir: found none, expected the folder of the run")
    from kgrec_jax.stages.finetune import run

    report = run(cfg, workdir)
    print(f"{report['task']} by {report['method']}, {report['trainable_share']:.2%} of the encoder trained, "
          f"{report['steps']:,} steps, {report['seconds']:.0f} s")
    for name, value in report["metrics"].items():
        if value is not None and name not in ("grad_norm", "learning_rate"):
            print(f"  {name:<24} {value:.4f}")
    return 0


def shipped() -> dict[str, pathlib.Path]:
    """The configs of configs/finetune, by name."""
    from kgrec_jax.config import shipped_configs

    folders = {file.parent / "finetune" for file in shipped_configs().values()}
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.py")) if file.stem != "__init__"}


def load(name: str) -> Any:
    """The FinetuneConfig of a file or of a shipped config; KgrecError in one line for anything else."""
    from kgrec_jax.config import load_file
    from kgrec_jax.stages.finetune import FinetuneConfig

    path, known = pathlib.Path(name).expanduser(), shipped()
    file = path if path.is_file() else known.get(path.name.removesuffix(".py"))
    if file is None or (file is not path and path.parent.parts not in ((), ("finetune",), ("configs", "finetune"))):
        raise KgrecError(f"CONFIG: found no file {name!r}, expected a path or a shipped config: {', '.join(known)}")
    return load_file(file, FinetuneConfig)
