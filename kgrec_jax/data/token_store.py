"""A corpus as token ids on disk: tokenised once, read through a memory map, split without the same text on both sides.

Memory grows with the number of documents (24 bytes each), not with their length.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kgrec_jax.data.text import Tokenizer
from kgrec_jax.errors import KgrecError

ALL = 1 << 30  # tokens of a document: none is cut
_TOGETHER = 512  # documents tokenised at once
_HAN = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3134F))


@dataclasses.dataclass(frozen=True, eq=False)
class Documents:
    """Some of the documents of a store; `documents[i]` is [n] int32, ~id where a token goes on with a word."""

    ids: np.ndarray  # [T] int32 of all documents
    offsets: np.ndarray  # [N + 1] int64
    chosen: np.ndarray  # [n] int64, which documents

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, row: int) -> np.ndarray:
        document = self.chosen[row]
        return self.ids[self.offsets[document] : self.offsets[document + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """[n] int64, tokens of each."""
        return self.offsets[self.chosen + 1] - self.offsets[self.chosen]


@dataclasses.dataclass(frozen=True, eq=False)
class TokenStore:
    """All documents of a corpus on disk, in the order in which they came."""

    folder: Path
    ids: np.ndarray  # [T] int32, a memory map
    offsets: np.ndarray  # [N + 1] int64
    hashes: np.ndarray  # [N] uint64 of the texts

    def split(self, share: float, limit: int, seed: int) -> tuple[Documents, Documents]:
        """(to train on, held out): distinct documents with at least one token, in their order.

        The hash of a text and the seed decide, so that one text never stands on both sides; `share` of the documents
        are held out, at most `limit`.
        """
        _, first = np.unique(self.hashes, return_index=True)
        first = np.sort(first[np.diff(self.offsets)[first] > 0])
        order = np.argsort(_mixed(self.hashes[first], seed), kind="stable")
        number = min(int(share * len(first)), limit)
        held, rest = (np.sort(first[part]) for part in (order[:number], order[number:]))
        return Documents(self.ids, self.offsets, rest), Documents(self.ids, self.offsets, held)


def marked(tokenizer: Tokenizer, texts: list[str], limit: int = ALL, segmented: bool = False) -> list[np.ndarray]:
    """Token ids of each text without special tokens, [n] int32, ~id where a token goes on with the word before.

    A piece with ## goes on with its word; with `segmented` also a Chinese character that follows another one without
    a blank between them.
    """
    if not texts:
        return []
    goes_on = continuations(tokenizer)
    out = tokenizer.backend(texts, add_special_tokens=False, truncation=True, max_length=limit, padding=False,
                            return_attention_mask=False, return_token_type_ids=False, return_offsets_mapping=segmented)
    rows = []
    for index, row in enumerate(out["input_ids"]):
        ids = np.asarray(row, np.int32)
        joins = goes_on[ids]
        if segmented and len(ids):
            spans, text = out["offset_mapping"][index], texts[index]
            joins = joins | np.array([False] + [
                before[1] == after[0] and _is_han(text[before[1] - 1]) and _is_han(text[after[0]])
                for before, after in itertools.pairwise(spans)])
        rows.append(np.where(joins, ~ids, ids))
    return rows


def continuations(tokenizer: Tokenizer) -> np.ndarray:
    """[vocab] bool: which tokens are the inner part of a word (WordPiece's ##)."""
    out = np.zeros(tokenizer.vocab_size, bool)
    out[[number for token, number in tokenizer.backend.get_vocab().items() if token.startswith("##")]] = True
    return out


def open_store(folder: Path, documents: Iterator[tuple[str, int]], tokenizer: Tokenizer, identity: dict[str, Any], *,
               total: int, segmented: bool, tracker: Any, limit: int = ALL) -> TokenStore:
    """The store in `folder`, made of `documents` (text, position so far of `total`) where it is not there yet.

    It appears whole or not at all: a killed tokenisation is done again. `identity` (JSON) says what it is of;
    KgrecError where the folder's is another one, and where no document has a token.
    """
    about = folder / "about.json"
    if not about.is_file():
        _write(folder, documents, tokenizer, identity, total, segmented, tracker, limit)
    held = json.loads(about.read_text(encoding="utf-8"))
    if held["identity"] != identity:
        changed = [name for name in identity if held["identity"].get(name) != identity[name]]
        raise KgrecError(f"{folder}: found the tokens of another corpus ({', '.join(changed)} differ), expected those "
                         "of pretrain.corpus as it was when the run began; choose another --workdir")
    if not held["tokens"]:
        raise KgrecError("pretrain.corpus: found no token in any document, expected text")
    ids = np.memmap(folder / "ids.int32", np.int32, "r")
    offsets = np.concatenate([[0], np.cumsum(np.fromfile(folder / "lengths.int64", np.int64))])
    if len(ids) != offsets[-1] or len(ids) != held["tokens"]:
        raise KgrecError(f"{folder}: found {len(ids):,} tokens, expected {held['tokens']:,}; the files were cut, "
                         "delete the folder and run again")
    return TokenStore(folder, ids, offsets, np.fromfile(folder / "hashes.uint64", np.uint64))


def _write(folder: Path, documents: Iterator[tuple[str, int]], tokenizer: Tokenizer, identity: dict, total: int,
           segmented: bool, tracker: Any, limit: int) -> None:
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # what a kill left
    shutil.rmtree(folder, ignore_errors=True)
    temporary.mkdir(parents=True)
    tokens = number = at = 0
    names = ("ids.int32", "lengths.int64", "hashes.uint64")
    with (open(temporary / names[0], "wb") as ids, open(temporary / names[1], "wb") as lengths,
          open(temporary / names[2], "wb") as hashes, tracker.progress("tokenise (kB)", -(-total // 1000)) as bar):
        while some := list(itertools.islice(documents, _TOGETHER)):
            rows = marked(tokenizer, [text for text, _ in some], limit, segmented)
            for row in rows:
                row.tofile(ids)
            np.array([len(row) for row in rows], np.int64).tofile(lengths)
            np.array([text_hash(text) for text, _ in some], np.uint64).tofile(hashes)
            tokens, number = tokens + sum(map(len, rows)), number + len(some)
            bar.advance(some[-1][1] // 1000 - at, tokens=f"{tokens:,}")
            at = some[-1][1] // 1000
    about = {"identity": identity, "documents": number, "tokens": tokens}
    (temporary / "about.json").write_text(json.dumps(about, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, folder)


def text_hash(text: str) -> int:
    """64 bits of a text, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def sample_texts(documents: Iterator[tuple[str, int]], share: float, seed: int) -> Iterator[str]:
    """About `share` of the documents' texts, drawn by their hash and the seed."""
    bound = np.uint64(min(int(share * 2.0**64), 2**64 - 1))
    for text, _ in documents:
        if share >= 1 or _mixed(np.array([text_hash(text)], np.uint64), seed)[0] < bound:
            yield text


def _mixed(hashes: np.ndarray, seed: int) -> np.ndarray:
    """[n] uint64 from the hashes and the seed (the finaliser of splitmix64)."""
    x = hashes + np.uint64((0x9E3779B97F4A7C15 * (2 * seed + 1)) % 2**64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _is_han(char: str) -> bool:
    return any(low <= ord(char) <= high for low, high in _HAN)
