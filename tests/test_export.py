"""Encoders written for others: the same weights read back, and the same outputs in torch transformers."""

import json
import os

import jax
import numpy as np
import pytest
from tiny_checkpoints import make_checkpoint
from tiny_encoder import make_tiny_encoder

from kgrec_jax import KgrecError, checkpoint, cli
from kgrec_jax.data.text import load_tokenizer
from kgrec_jax.models import encoders
from kgrec_jax.pretrained import load_encoder, save_encoder
from kgrec_jax.pretrained.hf import leaves

TEXTS = ["the cat sat on the mat", "a dog ran by the sea", "dog and cat"]
KINDS = {"torch-model": "BertModel", "torch-mlm": "BertForMaskedLM", "roberta": "RobertaForMaskedLM",
         "distilbert": "DistilBertForMaskedLM", "gpt2": "GPT2LMHeadModel"}


def source(kind, folder):
    if kind.startswith("torch"):
        return make_tiny_encoder(folder, TEXTS, kind=kind)
    return make_checkpoint(kind, folder, TEXTS)


def shifted(encoder, seed=0):
    """Weights as a stage would leave them: another value everywhere."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.asarray(x + 0.05 * rng.normal(size=x.shape), np.float32), encoder.params)


def make_run(folder, encoder_folder, **stages):
    """A run folder whose stages left these weights."""
    folder.mkdir()
    held = {"format_version": 1, "config": {"encoder": str(encoder_folder)}}
    (folder / "experiment.json").write_text(json.dumps(held))
    for stage, weights in stages.items():
        checkpoint.save_tree(folder / stage / "encoder", weights)
    return folder


def same(params, other):
    a, b = leaves(params), leaves(other)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("kind", list(KINDS))
def test_what_is_written_is_read_back_bit_for_bit(kind, tmp_path):
    encoder = load_encoder(source(kind, tmp_path / "in"))
    out = save_encoder(encoder, tmp_path / "made" / "out")
    again = load_encoder(out)
    same(again.params, encoder.params)
    assert again.config == encoder.config and again.has_mlm_head == encoder.has_mlm_head
    fields = json.loads((out / "config.json").read_text())
    assert fields["architectures"] == [KINDS[kind]] and fields["dtype"] == "float32"
    before = json.loads((tmp_path / "in" / "config.json").read_text())
    assert fields.get("eos_token_id") == before.get("eos_token_id") and "transformers_version" not in fields
    ids = [load_tokenizer(folder, encoder.config.vocab_size).encode(TEXTS, 16) for folder in (tmp_path / "in", out)]
    assert ids[0] == ids[1] and (out / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask()
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("kind", list(KINDS))
def test_torch_transformers_loads_it_with_equal_outputs(kind, tmp_path):
    torch = pytest.importorskip("torch", reason="needs the extra kgrec-jax[torch]")
    import transformers

    encoder = load_encoder(source(kind, tmp_path / "in"))
    params = shifted(encoder)
    out = save_encoder(encoder.with_params(params), tmp_path / "out")
    tokens = transformers.AutoTokenizer.from_pretrained(str(out))(TEXTS[:1], return_tensors="np")["input_ids"]
    assert tokens.tolist() == load_tokenizer(out).encode(TEXTS[:1], 16)
    ids = np.random.default_rng(0).integers(5, 100, (3, 9))
    mask = (np.arange(9) < np.array([[9], [6], [2]])).astype(np.int64)
    ids = np.where(mask > 0, ids, getattr(encoder.config, "pad_token_id", 0))
    states = encoder.hidden_states(params, ids, mask)
    head = {"gpt2": transformers.AutoModelForCausalLM, "torch-model": None}.get(kind, transformers.AutoModelForMaskedLM)
    for loader in filter(None, (transformers.AutoModel, head)):
        model, info = loader.from_pretrained(str(out), output_loading_info=True)
        assert {name for name in info["missing_keys"] if "pooler" not in name} == set()
        with torch.no_grad():
            found = model.eval()(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask),
                                 output_hidden_states=True)
        for ours, theirs in zip(states, found.hidden_states, strict=True):
            np.testing.assert_allclose(np.asarray(ours)[mask > 0], theirs.numpy()[mask > 0], rtol=0, atol=2e-5)
    if head:
        assert not info["missing_keys"] and not info["unexpected_keys"]
        logits = encoders.logits(encoder.config, params, states[-1])
        np.testing.assert_allclose(np.asarray(logits)[mask > 0], found.logits.numpy()[mask > 0], rtol=0, atol=4e-5)


def test_the_command_takes_the_latest_stage_or_the_one_that_is_named(tmp_path, capsys):
    folder = source("torch-mlm", tmp_path / "in")
    encoder = load_encoder(folder)
    first, second = shifted(encoder, 1), shifted(encoder, 2)
    run = make_run(tmp_path / "run", folder, pretrain=first, graph=second)
    for words, wanted in (([], second), (["--stage", "pretrain"], first), (["--stage", "released"], encoder.params)):
        out = tmp_path / f"out{len(words)}{words[-1:]}"
        assert cli.main(["encoder", "export", str(run), str(out), *words]) == 0
        same(load_encoder(out).params, wanted)
        assert "BertForMaskedLM of " in capsys.readouterr().err
        assert load_tokenizer(out).encode(TEXTS, 8) == load_tokenizer(folder).encode(TEXTS, 8)


def test_a_stage_that_trained_a_head_or_a_vocabulary_of_its_own(tmp_path):
    """The config and the tokenizer that the stage pretrain left come before those of the source."""
    released = load_encoder(source("torch-model", tmp_path / "in"))
    wanted = encoders.shapes(released.config, head=True)["cls"]
    head = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5, np.float32), wanted)
    grown = {**released.params, "cls": head}
    run = make_run(tmp_path / "run", tmp_path / "in", pretrain=grown)
    assert cli.main(["encoder", "export", str(run), str(tmp_path / "a")]) == 0
    same(load_encoder(tmp_path / "a").params, grown)
    source("gpt2", run / "pretrain" / "tokenizer")
    other = load_encoder(run / "pretrain" / "tokenizer")
    (run / "pretrain" / "encoder.json").write_text(json.dumps({"config": other.config.to_hf()}))
    checkpoint.save_tree(run / "pretrain" / "encoder", other.params)
    assert cli.main(["encoder", "export", str(run), str(tmp_path / "b")]) == 0
    same(load_encoder(tmp_path / "b").params, other.params)


def test_the_encoder_of_a_fine_tuning(tmp_path, capsys):
    folder = source("torch-model", tmp_path / "in")
    encoder, run, out = load_encoder(folder), tmp_path / "run", tmp_path / "out"
    run.mkdir()
    (run / "finetune.json").write_text("{}")
    assert cli.main(["encoder", "export", str(run), str(out)]) == 2
    assert "found no encoder, expected the one that a fine-tuning leaves" in capsys.readouterr().err
    tuned = shifted(encoder)
    checkpoint.save_tree(run / "encoder", tuned)
    (run / "encoder.json").write_text(json.dumps({"source": str(folder), "config": encoder.config.to_hf()}))
    assert cli.main(["encoder", "export", str(run), str(out), "--stage", "graph"]) == 2 and not out.exists()
    assert cli.main(["encoder", "export", str(run), str(out)]) == 0
    same(load_encoder(out).params, tuned)


def test_bad_calls_leave_nothing(tmp_path, capsys):
    folder = source("torch-model", tmp_path / "in")
    encoder = load_encoder(folder)
    bare = make_run(tmp_path / "bare", folder)
    run = make_run(tmp_path / "run", folder, graph={**shifted(encoder), "prefix": {"keys": np.ones(3, np.float32)}})
    out, taken = tmp_path / "out", tmp_path / "taken"
    taken.write_text("mine")
    for words, said in (
            ([bare, out], "found no stage that left an encoder"),
            ([bare, out, "--stage", "graph"], "found no encoder of the stage graph"),
            ([run, out, "--stage", "pretrain"], "expected --stage graph or released"),
            ([run, out, "--stage", "fuse"], "found 'fuse', expected one of"),
            ([run, out], "extra: prefix/keys"),
            ([run, taken, "--stage", "released"], "OUT: found an existing file"),
            ([run, folder, "--stage", "released"], "OUT: found an existing folder"),
            ([tmp_path / "none", out], "found no experiment.json"),
            ([run], "OUT: found none")):
        assert cli.main(["encoder", "export", *map(str, words)]) == 2
        err = capsys.readouterr().err
        assert said in err and err.startswith("kgrec: ") and err.count("\n") == 1, err
    assert cli.main(["encoder", "import"]) == 2 and "expected export" in capsys.readouterr().err
    assert not out.exists() and taken.read_text() == "mine"
    broken = jax.tree.map(lambda x: np.full_like(x, np.nan), encoder.params)
    with pytest.raises(KgrecError, match="not finite"):
        save_encoder(encoder.with_params(broken), out)
    (folder / "tokenizer.json").write_text("{")
    (folder / "tokenizer.json").rename(folder / "vocab.json")
    with pytest.raises(KgrecError, match="no readable tokenizer"):
        save_encoder(encoder, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "in", "run", "taken"]


def test_help_of_the_command(capsys):
    assert cli.main(["encoder"]) == 0 and "kgrec encoder export RUN OUT" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["encoder", "export", "--help"])
    assert "kgrec encoder export runs/quickstart" in capsys.readouterr().out
