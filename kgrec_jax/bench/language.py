"""`kgrec bench language`: masked-LM training and encoding in tokens a second, beside PyTorch where it is at hand.

Random weights, full-length texts, 15 % masked positions, AdamW, dropout: the step of the pretrain stage. Both programs
run in the same invocation, in processes of their own, one after the other and more than once; the medians are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from kgrec_jax.arguments import Parser, positive
from kgrec_jax.errors import KgrecError
from kgrec_jax.machine import cpu_threads, peak_mb

VOCABULARY = 30522
MASKED = 0.15
SHAPE = {"hidden": 384, "layers": 6, "heads": 12, "batch": 32, "length": 64, "steps": 10}


def _parser() -> Parser:
    out = Parser("bench language", f"""Measure masked-LM training and encoding, in tokens a second.

  kgrec bench language --peer-python torch-env/bin/python

{__doc__.partition(chr(10) * 2)[2]}""")
    for name, value in SHAPE.items():
        out.add_argument(f"--{name}", type=positive, default=value, help=f"default {value}")
    out.add_argument("--threads", type=int, default=0, help="processor threads; 0: all that this process may use")
    out.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the computation")
    out.add_argument("--texts", default="", help="a dataset folder: its item texts are encoded too, by both programs")
    out.add_argument("--encoder", default="", help="the encoder that reads --texts; default: all-MiniLM-L6-v2")
    out.add_argument("--peer-python", default="", help="an interpreter with torch and transformers: the peer runs too")
    out.add_argument("--rounds", type=positive, default=3, help="times that each program is run; medians are reported")
    out.add_argument("--json", action="store_true", help="one JSON object on the standard output")
    out.add_argument("--worker", choices=("", "ours"), default="", help=argparse.SUPPRESS)
    return out


def run(argv: list[str]) -> int:
    """Runs the benchmark; bad options and a peer that cannot run are KgrecErrors."""
    args = _parser().parse_args(argv)
    args.threads = args.threads or cpu_threads()
    if args.hidden % args.heads:
        raise KgrecError(f"--heads: found {args.heads}, expected a divisor of --hidden {args.hidden}")
    if args.worker:
        print(json.dumps(measure(args)))
        return 0
    ours, peers = [], []
    for _ in range(args.rounds):
        ours.append(_run_worker(argv, args))
        if args.peer_python:
            peers.append(_run_peer(args))
    result = _medians(ours)
    if peers:
        peer = _medians(peers)
        result["peer"] = peer
        result["ratio"] = {name: result[name] / peer[name] for name in
                           ("train_tokens_per_s", "encode_tokens_per_s", "texts_tokens_per_s") if name in peer}
    print(json.dumps(result) if args.json else "\n".join(lines(result)))
    return 0


def lines(result: dict) -> list[str]:
    """The result in words."""
    out = [f"{result['device']}, {result['dtype']}, hidden {result['hidden']}, {result['layers']} layers, "
           f"{result['batch']} × {result['length']} tokens"]
    names = {"train_tokens_per_s": "masked-LM training, tokens/s", "encode_tokens_per_s": "encoding, tokens/s",
             "texts_tokens_per_s": "item texts, tokens/s"}
    for key, words in names.items():
        if key in result:
            ratio = result.get("ratio", {}).get(key)
            out.append(f"{words:32s}{result[key]:12,.0f}" + ("" if ratio is None else
                       f"   {result['peer']['peer']} {result['peer'][key]:,.0f}, ratio {ratio:.2f}"))
    peak = result["matmul_peak_gflops"]
    out.append(f"{'model FLOP/s utilisation':32s}{result['train_utilisation']:12.1%}   training; encoding "
               f"{result['encode_utilisation']:.1%}; measured matmul peak {peak:,.0f} GFLOP/s")
    out.append(f"{'compilation, s':32s}{result['compile_s']:12.1f}")
    out.append(f"{'peak memory, MB':32s}{result['peak_mb']:12,.0f}" + (
        f"   peer {result['peer']['peak_mb']:,.0f}" if "peer" in result else ""))
    return out


def measure(args: argparse.Namespace) -> dict:
    """The figures of this program, in this process."""
    import jax

    device = jax.devices()[0]
    train, encode, compile_s = _speeds(args)
    found = {"device": device.device_kind, "dtype": args.dtype, **{name: getattr(args, name) for name in SHAPE},
             "threads": args.threads, "train_tokens_per_s": train, "encode_tokens_per_s": encode}
    if args.texts:
        found |= _texts_speed(args)
    found["peak_mb"] = peak_mb()
    peak = matmul_peak(args.dtype)
    per_token = flops_per_token(args.hidden, args.layers, args.length)
    vocabulary = 2.0 * args.hidden * (VOCABULARY + args.hidden) * MASKED
    return found | {"compile_s": compile_s, "matmul_peak_gflops": peak / 1e9,
                    "train_utilisation": 3 * (per_token + vocabulary) * train / peak,
                    "encode_utilisation": per_token * encode / peak}


def flops_per_token(hidden: int, layers: int, length: int) -> float:
    """Floating-point operations of one forward pass through the layers, for each token (Kaplan et al. 2020, §2.1)."""
    return layers * (24.0 * hidden * hidden + 4.0 * length * hidden)


def matmul_peak(dtype: str, size: int = 0) -> float:
    """FLOP/s of a large square matrix product on the first device: the best of several."""
    import jax
    import jax.numpy as jnp

    size = size or (2048 if jax.default_backend() == "cpu" else 8192)
    x = jnp.ones((size, size), jnp.dtype(dtype))
    product = jax.jit(jnp.dot)
    product(x, x).block_until_ready()
    return max(2.0 * size**3 / _seconds(lambda: product(x, x).block_until_ready()) for _ in range(6))


def _speeds(args: argparse.Namespace) -> tuple[float, float, float]:
    """(training tokens/s, encoding tokens/s, seconds of compiling both)."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from kgrec_jax.data.mlm_batches import MaskedBatch
    from kgrec_jax.models import bert
    from kgrec_jax.optim import OptimConfig, make_optimizer
    from kgrec_jax.stages import pretrain
    from kgrec_jax.train import TrainState, make_step

    config = bert.BertConfig(hidden_size=args.hidden, num_hidden_layers=args.layers, num_attention_heads=args.heads,
                             intermediate_size=4 * args.hidden, vocab_size=VOCABULARY)
    key, rng = jax.random.key(0), np.random.default_rng(0)
    params = {**bert.init_encoder(config, key), "cls": bert.init_head(config, key)}
    ids = rng.integers(1000, 30000, (args.batch, args.length)).astype(np.int32)
    masked = max(1, round(MASKED * args.length))
    positions = np.argsort(rng.random(ids.shape), axis=1)[:, :masked].astype(np.int32)
    targets = np.take_along_axis(ids, positions, axis=1)
    batch = MaskedBatch(ids, np.ones_like(ids), positions, targets, np.ones(positions.shape, np.float32))
    batch = jax.tree.map(jnp.asarray, batch)
    tx = make_optimizer(OptimConfig(peak_lr=1e-4, schedule="constant", warmup_share=0.0), 1000)

    def loss(params: Any, constants: Any, batch: Any, key: jax.Array) -> tuple:
        return pretrain.loss(config, params, batch, key, args.dtype)

    step = jax.jit(make_step(loss, tx, key), donate_argnums=0)

    @jax.jit
    def encode(params: Any, ids: jax.Array) -> jax.Array:
        module = bert.Bert(config, jnp.dtype(args.dtype))
        return module.apply({"params": params}, ids, jnp.ones_like(ids), jnp.zeros_like(ids))[-1]

    began = time.perf_counter()
    compiled = encode.lower(params, batch.input_ids).compile()
    with jax.numpy_dtype_promotion("standard"):
        state = TrainState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params), tx.init(params))
    trained = step.lower(state, {}, batch).compile()
    compile_s = time.perf_counter() - began
    encoding = _median_seconds(lambda: compiled(params, batch.input_ids).block_until_ready(), args.steps)

    def train() -> None:
        nonlocal state
        state, _ = trained(state, {}, batch)
        jax.block_until_ready(state.params)

    training = _median_seconds(train, args.steps)
    return ids.size / training, ids.size / encoding, compile_s


def _texts_speed(args: argparse.Namespace) -> dict[str, float]:
    """Tokens a second of encoding the item texts of a dataset folder as the fusion stage does, compilation apart."""
    from kgrec_jax.data.text import load_tokenizer
    from kgrec_jax.models.text_encoder import encode_texts
    from kgrec_jax.pretrained.hf import load_encoder

    rows = item_texts(args.texts)
    encoder = load_encoder(encoder_folder(args))
    tokenizer = load_tokenizer(encoder.tokenizer_folder, encoder.config.vocab_size)
    length = min(encoder.config.max_position_embeddings, 256)
    tokens = sum(len(ids) for ids in tokenizer.encode(rows, length))
    encode_texts(encoder, encoder.params, tokenizer, rows, max_length=length, batch_size=args.batch)
    seconds = _seconds(lambda: encode_texts(encoder, encoder.params, tokenizer, rows, max_length=length,
                                            batch_size=args.batch))
    return {"texts": len(rows), "texts_tokens_per_s": tokens / seconds}


def item_texts(folder: str) -> list[str]:
    """The item texts of a dataset folder that are not empty."""
    from kgrec_jax.data.folder import read_folder

    rows = [text for text in read_folder(folder).item_texts if text.strip()]
    if not rows:
        raise KgrecError(f"--texts: found no item texts in {folder}, expected some")
    return rows


def encoder_folder(args: argparse.Namespace) -> pathlib.Path:
    """The local folder of the encoder that reads --texts."""
    from kgrec_jax.config import ENCODER
    from kgrec_jax.data.sources import resolve

    return resolve(args.encoder or ENCODER, say=lambda text: print(text, file=sys.stderr))


def _run_worker(argv: list[str], args: argparse.Namespace) -> dict:
    """The figures of a fresh process of this program, on as many threads as asked for."""
    code = "import sys; from kgrec_jax.bench.language import run; sys.exit(run(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *argv, "--worker", "ours"]
    return _run_json(command, args, "this program")


def _run_peer(args: argparse.Namespace) -> dict:
    """The figures of PyTorch in its own interpreter."""
    script = pathlib.Path(__file__).with_name("torch_peer.py")
    words = [f"--{name}={getattr(args, name)}" for name in SHAPE] + [f"--threads={args.threads}"]
    if not args.texts:
        return _run_json([args.peer_python, str(script), *words], args, "--peer-python")
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        file = pathlib.Path(scratch) / "texts.json"
        file.write_text(json.dumps(item_texts(args.texts)), encoding="utf-8")
        words += [f"--texts={file}", f"--encoder={encoder_folder(args)}"]
        return _run_json([args.peer_python, str(script), *words], args, "--peer-python")


def _run_json(command: list[str], args: argparse.Namespace, what: str) -> dict:
    count = args.threads
    keep = set(sorted(os.sched_getaffinity(0))[:count]) if hasattr(os, "sched_getaffinity") else None

    def pin() -> None:
        if keep:
            os.sched_setaffinity(0, keep)

    env = {**os.environ, "OMP_NUM_THREADS": str(count), "TOKENIZERS_PARALLELISM": "true", "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=env, preexec_fn=pin)
    except OSError as error:
        raise KgrecError(f"{what}: found {command[0]}, which cannot be run ({error.strerror})") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise KgrecError(f"{what}: the benchmark ended with code {done.returncode}: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _medians(found: list[dict]) -> dict:
    """The middle of each figure over the rounds; what is no figure is that of the first."""
    def middle(name: str) -> Any:
        values = [one[name] for one in found]
        if not isinstance(values[0], float | int) or isinstance(values[0], bool):
            return values[0]
        return sorted(values)[len(values) // 2]

    return {name: middle(name) for name in found[0]}


def _seconds(function: Callable[[], Any]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def _median_seconds(function: Callable[[], Any], steps: int) -> float:
    for _ in range(2):
        function()
    return sorted(_seconds(function) for _ in range(steps))[steps // 2]
