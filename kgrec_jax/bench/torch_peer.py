"""The peer of `kgrec bench language`: PyTorch and transformers, by an interpreter that has them; prints one JSON line.

It needs nothing of this package. Random weights and AdamW for training, every position through the vocabulary as
transformers' own class does; with --texts a plain loop over the texts in their order, padded to the batch's longest.
"""

import argparse
import json
import resource
import time

import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertForMaskedLM


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser()
    for name in ("hidden", "layers", "heads", "batch", "length", "steps", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--texts", default="")
    parser.add_argument("--encoder", default="")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = BertConfig(hidden_size=args.hidden, num_hidden_layers=args.layers, num_attention_heads=args.heads,
                        intermediate_size=4 * args.hidden)
    model = BertForMaskedLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(1000, 30000, (args.batch, args.length))
    labels = torch.where(torch.rand(ids.shape) < 0.15, ids, -100)
    mask = torch.ones_like(ids)

    def train() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()

    model.train()
    found = {"peer": f"torch {torch.__version__}", "train_tokens_per_s": ids.numel() / median(train, args.steps)}
    model.eval()
    with torch.inference_mode():
        seconds = median(lambda: model.bert(input_ids=ids, attention_mask=mask).last_hidden_state, args.steps)
        found["encode_tokens_per_s"] = ids.numel() / seconds
        if args.texts:
            found["texts_tokens_per_s"] = read(args)
    found["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(found))


def read(args: argparse.Namespace) -> float:
    """Tokens a second of a plain padded loop over the texts, mean pooling included."""
    with open(args.texts, encoding="utf-8") as file:
        texts = json.load(file)
    tokenizer, model = AutoTokenizer.from_pretrained(args.encoder), AutoModel.from_pretrained(args.encoder).eval()
    length = min(model.config.max_position_embeddings, 256)

    def loop() -> int:
        tokens = 0
        for start in range(0, len(texts), args.batch):
            batch = tokenizer(texts[start:start + args.batch], padding=True, truncation=True, max_length=length,
                              return_tensors="pt")
            hidden = model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None].float()
            torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
            tokens += int(batch["attention_mask"].sum())
        return tokens

    began = time.perf_counter()
    tokens = loop()
    return tokens / (time.perf_counter() - began)


def median(function, steps: int) -> float:
    """Median seconds of a call, after two to warm up."""
    for _ in range(2):
        function()
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return sorted(times)[steps // 2]


if __name__ == "__main__":
    main()
