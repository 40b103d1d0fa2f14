"""Corpora of every kind as a stream of documents, and their tokens on disk."""

import bz2
import gzip
import json
import lzma

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from kgrec_jax.data import corpus, token_store
from kgrec_jax.data.text import load_tokenizer, train_wordpiece
from kgrec_jax.errors import KgrecError
from kgrec_jax.tracking import Tracker

ENGLISH = ["the cat sat on the mat", "a dog and a log", "unbelievable cats", "the dog sat on a cat"]


def read(*paths, say=lambda line: None):
    return [text for text, _ in corpus.documents(corpus.find_files([str(p) for p in paths], say))]


def written(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text if isinstance(text, bytes) else text.encode()
    packers = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
               ".zst": lambda d: pa.Codec("zstd").compress(d, asbytes=True)}
    path.write_bytes(packers.get(path.suffix, lambda d: d)(data))
    return path


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst", ".bz2", ".xz"])
def test_text_by_lines_and_by_blocks(tmp_path, suffix):
    lines = written(tmp_path / f"lines.txt{suffix}", "\ufeffone\r\ntwo words\n\n")
    blocks = written(tmp_path / f"blocks.txt{suffix}", "\none\nsame\n\n\ntwo\n")
    assert read(lines) == ["one", "two words"] and read(blocks) == ["one\nsame", "two"]
    assert read(tmp_path) == ["one\nsame", "two", "one", "two words"], "a folder: in order of the names"


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_json_lines_and_wikipedia(tmp_path, suffix):
    rows = [{"id": "1", "text": "eins\nzwei"}, {"text": ""}, {"text": "drei"}]
    lines = "\n".join(map(json.dumps, rows)) + "\n"
    docs = '<doc id="1" title="A">\nA\n\nfirst line\n</doc>\n<doc id="2" title="B">\nB\n</doc>\n'
    written(tmp_path / "w" / "AA" / f"wiki_00{suffix}", lines)
    written(tmp_path / "w" / "AB" / f"wiki_00{suffix}", docs)
    assert read(tmp_path / "w") == ["eins\nzwei", "drei", "A\nfirst line", "B"]
    assert read(written(tmp_path / f"x.jsonl{suffix}", lines)) == ["eins\nzwei", "drei"]


def test_tables(tmp_path):
    rows = [("Oak", "oak, a tree"), ("Elm", ""), ("Ash", "A tall tree")]
    expected = ["oak, a tree", "Ash. A tall tree"]
    for suffix, separator in ((".tsv", "\t"), (".tsv.gz", "\t"), (".csv", ",")):
        quoted = [[f'"{v}"' if separator == "," and v else v for v in row] for row in rows]
        text = separator.join(("entity_id", "name", "description")) + "\n" + "".join(
            separator.join((str(i), *row)) + "\n" for i, row in enumerate(quoted))
        assert read(written(tmp_path / f"t{suffix}", text)) == expected
    table = pa.table({"name": [r[0] for r in rows], "description": [r[1] for r in rows], "n": [1, 2, 3]})
    pa.parquet.write_table(table, tmp_path / "t.parquet")
    assert read(tmp_path / "t.parquet") == expected
    pa.parquet.write_table(pa.table({"text": ["one", None, "two"], "title": ["x", "y", "z"]}), tmp_path / "u.parquet")
    assert read(tmp_path / "u.parquet") == ["one", "two"]


def test_a_dataset_folder_gives_its_texts_and_nothing_else(tmp_path):
    written(tmp_path / "d" / "items.tsv", "item_id\ttitle\tgenres\tdescription\n1\tOak\tDrama\ta tall tree\n")
    written(tmp_path / "d" / "entities.tsv", "entity_id\tname\ne\tonly a name\n")
    written(tmp_path / "d" / "interactions.tsv", "user_id\titem_id\n1\t1\n")
    written(tmp_path / "e" / "test.tsv", "user_id\titem_id\n1\t1\n")
    said = []
    assert read(tmp_path / "d", tmp_path / "e", say=said.append) == ["Oak. a tall tree"]
    assert len(said) == 1 and "test.tsv left out" in said[0]


def test_a_named_file_of_any_name_is_looked_into(tmp_path):
    assert read(written(tmp_path / "corpus.dat", '\n{"text": "one"}\n')) == ["one"]
    assert read(written(tmp_path / "README", "one\ntwo\n")) == ["one", "two"]


@pytest.mark.parametrize("name,data,words", [
    ("a.txt", b"fine\ncaf\xe9\n", "a.txt:2: found bytes that are not UTF-8"),
    ("a.txt", "text".encode("utf-16"), "a.txt:1: found bytes that are not UTF-8"),
    ("a.txt", "\n \n", "found no text in .*a.txt, expected at least one document"),
    ("a.jsonl", '{"text": "a"}\n{"text": 3}\n', "a.jsonl:2: found the fields text, expected an object with a string"),
    ("a.jsonl", '{"text": "a"}\n{"te', "a.jsonl:2: found no JSON"),
    ("wiki_00", "<doc id=1>\nText\n", "wiki_00:2: found the end of the file inside <doc"),
    ("a.tsv", "head\trelation\n1\t2\n", "a.tsv:1: found the columns head, relation, expected `text` or one of"),
    ("a.tsv", "text\tn\none\t1\ntwo\n", "a.tsv:3: found 1 columns, expected 2"),
    ("a.csv", 'text\n"open', "a.csv:2: found no CSV"),
    ("a.parquet", "PAR1 no", "a.parquet: found something that is not Parquet"),
    ("a.parquet.gz", "x", "a.parquet.gz: found compressed Parquet")])
def test_bad_files(tmp_path, name, data, words):
    with pytest.raises(KgrecError, match=words):
        read(written(tmp_path / name, data))


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2", ".xz"])
def test_damaged_compression(tmp_path, suffix):
    whole = written(tmp_path / f"a.txt{suffix}", "".join(f"line {i * 7919 % 1009}\n" for i in range(5000)))
    cut = tmp_path / f"cut.txt{suffix}"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(KgrecError, match=rf"cut.txt{suffix}:\d+: found damaged {suffix} data .*expected a whole file"):
        read(cut)
    cut.write_bytes(b"no such thing at all")
    with pytest.raises(KgrecError, match=rf"cut.txt{suffix}:1: found damaged {suffix} data"):
        read(cut)


def test_paths_that_hold_nothing(tmp_path):
    with pytest.raises(KgrecError, match="pretrain.corpus: found no file or folder /no/such"):
        read("/no/such")
    (tmp_path / "x.bin").write_bytes(b"x")
    with pytest.raises(KgrecError, match="found no file with texts in"):
        read(tmp_path)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(train_wordpiece(ENGLISH * 5 + ["中国人民银行"], tmp_path_factory.mktemp("t") / "t", 90))


def store(folder, tokenizer, texts, **options):
    ends = np.cumsum([len(t) for t in texts]).tolist()
    options = {"identity": {"files": len(texts)}, "total": ends[-1], "segmented": False,
               "tracker": Tracker(folder, quiet=True)} | options
    return token_store.open_store(folder / "tokens", iter(zip(texts, ends, strict=True)), tokenizer, **options)


def test_words_are_marked(tokenizer):
    known = tokenizer.backend.get_vocab()
    rows = token_store.marked(tokenizer, ["unbelievable cats", ""])
    pieces = tokenizer.backend.convert_ids_to_tokens(np.where(rows[0] < 0, ~rows[0], rows[0]).tolist())
    assert [p.startswith("##") for p in pieces] == (rows[0] < 0).tolist() and len(rows[1]) == 0
    plain = tokenizer.encode(["unbelievable cats"], 99, special=False)[0]
    assert plain == np.where(rows[0] < 0, ~rows[0], rows[0]).tolist()
    chinese = token_store.marked(tokenizer, ["中国 人民，银行 cats"], segmented=True)[0]
    assert (chinese[:6] < 0).tolist() == [False, True, False, True, False, False] and ~chinese[1] == known["国"]
    assert (token_store.marked(tokenizer, ["中国 人民"])[0] >= 0).all()


def test_the_store_keeps_every_document_and_is_made_once(tmp_path, tokenizer):
    texts = [f"the cat sat on the mat {i}" for i in range(1300)]
    first = store(tmp_path, tokenizer, texts)
    rows = token_store.marked(tokenizer, texts)
    assert isinstance(first.ids, np.memmap) and len(first.hashes) == 1300
    np.testing.assert_array_equal(first.ids, np.concatenate(rows))

    def never():
        raise AssertionError("tokenised again")
        yield

    again = token_store.open_store(tmp_path / "tokens", never(), tokenizer, {"files": 1300}, total=1, segmented=False,
                                   tracker=Tracker(tmp_path, quiet=True))
    np.testing.assert_array_equal(again.offsets, first.offsets)
    with pytest.raises(KgrecError, match="found the tokens of another corpus"):
        store(tmp_path, tokenizer, texts, identity={"files": 1})
    with open(tmp_path / "tokens" / "ids.int32", "ab") as file:
        file.truncate(100)
    with pytest.raises(KgrecError, match="the files were cut"):
        store(tmp_path, tokenizer, texts)


def test_a_killed_tokenisation_is_done_again(tmp_path, tokenizer):
    def killed():
        yield from ((text, i) for i, text in enumerate(ENGLISH * 200))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        token_store.open_store(tmp_path / "tokens", killed(), tokenizer, {"files": 4}, total=9, segmented=False,
                               tracker=Tracker(tmp_path, quiet=True))
    assert not (tmp_path / "tokens").exists() and (tmp_path / ".tokens.tmp").is_dir()
    assert len(store(tmp_path, tokenizer, ENGLISH).hashes) == 4 and not (tmp_path / ".tokens.tmp").exists()


def test_one_text_is_never_on_both_sides(tmp_path, tokenizer):
    texts = [f"the cat {i % 150}" for i in range(300)] + ["\x00", "the mat"]
    held = store(tmp_path, tokenizer, texts)
    train, valid = held.split(0.2, 1000, seed=1)
    sides = [set(held.hashes[side.chosen].tolist()) for side in (train, valid)]
    assert not sides[0] & sides[1] and len(train) + len(valid) == 151 and len(valid) == 30
    other = held.split(0.2, 5, seed=2)
    assert len(other[1]) == 5 and list(train.lengths) == [len(train[i]) for i in range(len(train))]
