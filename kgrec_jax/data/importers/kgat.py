"""KGAT's files (https://github.com/xiangwang1223/knowledge_graph_attention_network) into a dataset folder with their
fixed split: train.txt and test.txt (a user and its items a line), kg_final.txt (head relation tail, integers), and the
lists that say what the integers stand for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from kgrec_jax.data import names
from kgrec_jax.data.importers import write_new_folder
from kgrec_jax.data.importers.recbole_graph import relation_name
from kgrec_jax.data.lines import encoding_error
from kgrec_jax.errors import KgrecError

_PARTS = {"train": "train.txt", "valid": "valid.txt", "test": "test.txt"}
_LISTS = ("item_list.txt", "entity_list.txt", "relation_list.txt", "user_list.txt")


@dataclasses.dataclass(frozen=True)
class _List:
    """A list file: number in the other files -> the original id and, for items, the entity that it is linked to."""

    original: Mapping[str, str]
    linked: Mapping[str, str]

    def __getitem__(self, number: str) -> str:
        return self.original.get(number, number)


def import_kgat(source: Path, out: Path) -> list[str]:
    """Write the dataset folder `out`; returns lines that say what was done.

    Ids are the original ones where the lists give them, else KGAT's numbers; entities 0 … are the items, by their
    number. `out` must not exist or be empty; it appears complete or not at all. Raises KgrecError with file and line
    for a malformed line, and for an absent train.txt or test.txt.
    """
    source, out = Path(source), Path(out)
    if not source.is_dir():
        raise KgrecError(f"{source}: found no folder, expected one with KGAT's files ({', '.join(_PARTS.values())}, "
                         "kg_final.txt)")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise KgrecError(f"{out}: found a file or a folder that is not empty, expected a new one; choose another OUT")
    notes: list[str] = []
    item, entity, relation, user = (_read_list(source / name, notes) for name in _LISTS)
    logs = {part: _read_log(source / name, notes) for part, name in _PARTS.items()
            if part != "valid" or (source / name).is_file()}
    triples = _read_triples(source / "kg_final.txt", notes)
    tables: dict[str, Mapping[str, Sequence[str]]] = {}
    for part, rows in logs.items():
        if rows or part == "train":
            tables[part] = {"user_id": [user[u] for u, _ in rows], "item_id": [item[i] for _, i in rows]}
    numbers = list(dict.fromkeys([*item.original, *(i for rows in logs.values() for _, i in rows)]))
    listed = {number: item.linked.get(number) or entity.original.get(number) for number in numbers}
    ids = _entities(numbers, listed, item, entity)
    tables["items"] = {"item_id": [item[n] for n in numbers], "entity_id": [ids[n] for n in numbers],
                       "title": [names.name_from_id(_unprefixed(item[n])) for n in numbers]}
    if triples:
        _add_graph(tables, triples, ids, entity, relation)
    notes.insert(0, f"{len({u for rows in logs.values() for u, _ in rows}):,} users, {len(numbers):,} items, "
                    f"{sum(map(len, logs.values())):,} interactions, {len(triples):,} triples")
    write_new_folder(out, tables)
    return notes


def _entities(numbers: Sequence[str], listed: Mapping[str, str | None], item: _List, entity: _List) -> dict[str, str]:
    """Number -> entity id, all different: an item's is the one that it is linked to, or its own id."""
    ids: dict[str, str] = {}
    taken: set[str] = set()
    others = {entity[n] for n in entity.original if n not in listed}
    for n in numbers:
        chosen = listed[n] or item[n]
        if chosen in taken or (chosen in others and not item.linked.get(n)):
            chosen = f"item/{item[n]}"
        ids[n] = chosen
        taken.add(chosen)
    return ids


def _add_graph(tables: dict[str, Mapping[str, Sequence[str]]], triples: Sequence[tuple[str, str, str]],
               items: Mapping[str, str], entity: _List, relation: _List) -> None:
    ids, taken = dict(items), set(items.values())
    for number in dict.fromkeys(n for h, _, t in triples for n in (h, t)):
        if number not in ids:
            chosen = entity[number]
            ids[number] = f"entity/{chosen}" if chosen in taken else chosen
            taken.add(ids[number])
    used = list(dict.fromkeys(r for _, r, _ in triples))
    rest = [ids[n] for n in ids if n not in items]
    tables["triples"] = {"head_id": [ids[h] for h, _, _ in triples], "relation": [relation[r] for _, r, _ in triples],
                         "tail_id": [ids[t] for _, _, t in triples]}
    tables["relations"] = {"relation": [relation[r] for r in used],
                           "name": [relation_name(names.local_name(relation[r])) for r in used]}
    if rest:
        tables["entities"] = {"entity_id": rest, "name": [names.name_from_id(e) for e in rest]}


def _unprefixed(identifier: str) -> str:
    """Amazon's ASINs and other keys in capitals and digits are no titles."""
    is_key = len(identifier) > 6 and identifier.isalnum() and identifier.upper() == identifier
    return "" if is_key else identifier


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, words) of the lines that are not empty."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if words := line.split():
                    yield number, words
    except UnicodeDecodeError:
        lines = path.read_bytes().split(b"\n")
        bad = next((k for k, line in enumerate(lines, 1) if "\ufffd" in line.decode("utf-8", "replace")), 1)
        raise encoding_error(path, bad) from None


def _numbers(path: Path, line: int, words: Sequence[str]) -> list[str]:
    """The words as numbers without leading zeros."""
    bad = next((w for w in words if not (w.isascii() and w.isdecimal())), None)
    if bad is not None:
        raise KgrecError(f"{path}:{line}: found {bad!r}, expected whole numbers alone; correct or remove the line")
    return [str(int(w)) for w in words]


def _read_list(path: Path, notes: list[str]) -> _List:
    """A list with the columns org_id remap_id [freebase_id], by its header or, without one, in this order."""
    original: dict[str, str] = {}
    linked: dict[str, str] = {}
    if not path.is_file():
        notes.append(f"{path.name}: absent, so ids are KGAT's numbers")
        return _List(original, linked)
    own, number, link = 0, 1, 2
    for line, words in _lines(path):
        if line == 1 and "remap_id" in words:
            number = words.index("remap_id")
            own = words.index("org_id") if "org_id" in words else 1 - number
            link = words.index("freebase_id") if "freebase_id" in words else len(words)
            continue
        if len(words) <= max(own, number) or not words[number].isdecimal():
            raise KgrecError(f"{path}:{line}: found {' '.join(words)[:60]!r}, expected org_id remap_id with a whole "
                             "number as remap_id; correct or remove the line")
        key = str(int(words[number]))
        if key in original:
            raise KgrecError(f"{path}:{line}: found the remap_id {key} a second time, expected each once; correct the "
                             "line")
        original[key] = words[own]
        if link < len(words):
            linked[key] = words[link]
    seen: dict[str, str] = {}
    for key, value in original.items():
        if value in seen:
            raise KgrecError(f"{path}: found the org_id {value!r} for the remap_ids {seen[value]} and {key}, expected "
                             "each once; rename one of them")
        seen[value] = key
    return _List(original, linked)


def _read_log(path: Path, notes: list[str]) -> list[tuple[str, str]]:
    if not path.is_file():
        raise KgrecError(f"{path}: found no such file, expected KGAT's train.txt and test.txt; check SOURCE")
    rows: dict[tuple[str, str], None] = {}
    count = alone = 0
    for line, words in _lines(path):
        user, *items = _numbers(path, line, words)
        alone += not items
        count += len(items)
        rows |= dict.fromkeys((user, item) for item in items)
    if not rows:
        raise KgrecError(f"{path}: found no user with an item, expected a user and its items a line")
    return _counted(list(rows), path, notes, (alone, "users have no item"),
                    (count - len(rows), "pairs repeat one; each counts once"))


def _read_triples(path: Path, notes: list[str]) -> list[tuple[str, str, str]]:
    if not path.is_file():
        notes.append(f"{path.name}: absent, so there is no graph")
        return []
    rows: dict[tuple[str, ...], None] = {}
    count = 0
    for line, words in _lines(path):
        if len(words) != 3:
            raise KgrecError(f"{path}:{line}: found {len(words)} fields, expected 3 (head relation tail); correct or "
                             "remove the line")
        rows[tuple(_numbers(path, line, words))] = None
        count += 1
    return _counted(list(rows), path, notes, (count - len(rows), "lines repeat a triple; each counts once"))


def _counted(rows: list, path: Path, notes: list[str], *counts: tuple[int, str]) -> list:
    notes += [f"{path.name}: {count:,} {what}" for count, what in counts if count]
    return rows
