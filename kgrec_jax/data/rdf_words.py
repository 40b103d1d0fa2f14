"""What literals of RDF say of entities and relations, and which entities are one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from kgrec_jax.data.names import relation_name
from kgrec_jax.data.rdf_terms import bare
from kgrec_jax.data.texts import separator
from kgrec_jax.errors import KgrecError

TYPE = "<http://www.w3.org/1999/02/22-rdf-syntax-ns#type>"
SAME_AS = "<http://www.w3.org/2002/07/owl#sameAs>"
_SCHEMA = ("http://schema.org/", "https://schema.org/")
# Of two names in one language the earlier relation's counts; the same for descriptions.
NAMES = ("<http://www.w3.org/2000/01/rdf-schema#label>", *(f"<{s}name>" for s in _SCHEMA),
         "<http://www.w3.org/2004/02/skos/core#prefLabel>", "<http://xmlns.com/foaf/0.1/name>")
DESCRIPTIONS = ("<http://dbpedia.org/ontology/abstract>", "<http://www.w3.org/2000/01/rdf-schema#comment>",
                *(f"<{s}description>" for s in _SCHEMA))
_XSD = "http://www.w3.org/2001/XMLSchema#"
_NOT_TEXT = {f"{_XSD}base64Binary", f"{_XSD}hexBinary", "http://www.opengis.net/ont/geosparql#wktLiteral",
             "http://www.w3.org/1999/02/22-rdf-syntax-ns#XMLLiteral"}
_FOREIGN, _NO_TEXT = -1, -2
_ESCAPE = re.compile(r"\\(?:u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|(.))")
_ESCAPED = {"t": "\t", "n": "\n", "r": "\r", "b": "\b", "f": "\f"}


def split_literal(literal: str) -> tuple[str, str]:
    """(value, what follows it: "", @LANGUAGE or ^^<DATATYPE>) of a literal as it stands in a statement."""
    end = literal.rfind('"')
    value = literal[1:end]
    if "\\" in value:
        value = _ESCAPE.sub(lambda m: _ESCAPED.get(m[3], m[3]) if m[3] else chr(int(m[1] or m[2], 16)), value)
    return value, literal[end + 1:]


class Words:
    """What literals say of entities and relations: the best name and description, other text, and counts of the rest.

    Subjects and relations are terms. `languages` are those wanted, best first; text without a language comes after
    them, text in other languages is counted and left out.
    """

    def __init__(self, languages: Sequence[str]):
        self._languages = {language.lower(): k for k, language in reversed(list(enumerate(languages)))}
        self._ranks: dict[str, int] = {}  # of what follows a literal
        self.names: dict[str, tuple[int, str]] = {}  # subject -> (rank, value), the lowest is the best
        self.descriptions: dict[str, tuple[int, str]] = {}
        self.texts: dict[str, dict[str, list[str]]] = {}  # subject -> relation -> values
        self.counts: Counter[str] = Counter()
        self._kinds = {p: (self.names, k, len(NAMES)) for k, p in enumerate(NAMES)}
        self._kinds |= {p: (self.descriptions, k, len(DESCRIPTIONS)) for k, p in enumerate(DESCRIPTIONS)}

    def add(self, subject: str, relation: str, literal: str) -> None:
        """Takes one statement with a literal."""
        value, suffix = split_literal(literal)
        rank = self._ranks.get(suffix)
        if rank is None:
            rank = self._ranks[suffix] = self._rank(suffix)
        if rank == _FOREIGN:
            self.counts["literals in other languages"] += 1
            return
        value = " ".join(value.split())
        if rank == _NO_TEXT or not value:
            self.counts["literals that are empty or no text"] += 1
        elif relation in self._kinds:
            best, order, many = self._kinds[relation]
            found, old = (rank * many + order, value), best.get(subject)
            if old is None:
                best[subject] = found
            elif old != found:
                self.counts["names or descriptions beside a better one"] += 1
                best[subject] = min(old, found)
        else:
            values = self.texts.setdefault(subject, {}).setdefault(relation, [])
            if value not in values:
                values.append(value)

    def _rank(self, suffix: str) -> int:
        if suffix.startswith("^^"):
            return _NO_TEXT if suffix[3:-1] in _NOT_TEXT else len(self._languages)
        if not suffix:
            return len(self._languages)
        language = suffix[1:].partition("--")[0].lower()  # a direction of writing may follow; en-gb counts as en
        return self._languages.get(language, self._languages.get(language.partition("-")[0], _FOREIGN))

    def merge(self, other: Words) -> None:
        """Takes over what another one has collected."""
        for mine, its in ((self.names, other.names), (self.descriptions, other.descriptions)):
            for subject, found in its.items():
                old = mine.setdefault(subject, found)
                if old != found:
                    self.counts["names or descriptions beside a better one"] += 1
                    mine[subject] = min(old, found)
        for subject, relations in other.texts.items():
            own = self.texts.setdefault(subject, {})
            for relation, values in relations.items():
                own[relation] = list(dict.fromkeys([*own.get(relation, ()), *values]))
        self.counts.update(other.counts)

    def renamed(self, name: Callable[[str], str]) -> Words:
        """The same of subjects under other names; two that get one name are merged."""
        tables = (self.names, self.descriptions, self.texts)
        if all(name(subject) == subject for table in tables for subject in table):
            return self
        out = Words(tuple(self._languages))
        out.counts.update(self.counts)
        for mine, its in ((out.names, self.names), (out.descriptions, self.descriptions)):
            for subject, found in its.items():
                mine[name(subject)] = min(mine.get(name(subject), found), found)
        for subject, relations in self.texts.items():
            own = out.texts.setdefault(name(subject), {})
            for relation, values in relations.items():
                own[relation] = list(dict.fromkeys([*own.get(relation, ()), *values]))
        return out

    def name(self, subject: str) -> str:
        """The best name, "" without one."""
        return self.names.get(subject, (0, ""))[1]

    def text(self, subject: str, relation_names: Mapping[str, str]) -> str:
        """The description, then `relation name: value` of all else."""
        text = self.descriptions.get(subject, (0, ""))[1]
        for relation, values in self.texts.get(subject, {}).items():
            label = relation_names.get(relation) or relation_name(bare(relation))
            text += f"{separator(text) if text else ''}{label}: {', '.join(values)}"
        return text

    def __contains__(self, subject: str) -> bool:
        return subject in self.names or subject in self.descriptions or subject in self.texts

    def notes(self, where: str) -> list[str]:
        """A line for each kind of literal that was left out."""
        return [f"{where}: {count:,} {kind}: not used" for kind, count in sorted(self.counts.items())]


def merge_same(pairs: Sequence[tuple[str, str]], items: Mapping[str, str]) -> dict[str, str]:
    """Entity -> the one that stands for it, from owl:sameAs pairs; those that stand for themselves are left out.

    An item stands for its group, else the first one named. `items` is entity -> item; two of them in a group are an
    error that names both. Cycles are no trouble.
    """
    parent: dict[str, str] = {}

    def root(x: str) -> str:
        while (up := parent.get(x, x)) != x:
            parent[x] = x = parent.get(up, up)
        return x

    for a, b in pairs:
        a, b = root(a), root(b)
        if a == b:
            continue
        if a in items and b in items:
            raise KgrecError(f"owl:sameAs: found the items {items[a]!r} ({a}) and {items[b]!r} ({b}) stated to be one "
                             "thing, expected each item to be a thing of its own; correct the statement or the item "
                             "table's column entity_id")
        keep, drop = (b, a) if b in items else (a, b)
        parent[drop] = keep
    return {x: found for x in list(parent) if (found := root(x)) != x}
