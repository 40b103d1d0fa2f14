"""The neighbourhood of items from a SPARQL endpoint, as N-Triples on disk: batches of entities, pages of answers."""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from kgrec_jax.data.rdf_words import SAME_AS
from kgrec_jax.errors import KgrecError
from kgrec_jax.tracking import Tracker

_BATCH = 100  # entities to a question
_PAGE = 5_000  # rows to an answer; a server that gives fewer is asked on until it has none left
_TRIES = 4
_PASSING = (408, 429, 500, 502, 503, 504)  # worth another try


class Endpoint:
    """Asks an endpoint, again after a while where it fails in passing."""

    def __init__(self, url: str, timeout: float = 60.0, wait: float = 1.0):
        if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
            raise KgrecError(f"--endpoint: found {url!r}, expected the http(s) address of a SPARQL endpoint")
        self.url, self._timeout, self._wait, self._answers = url, timeout, wait, 0

    def select(self, pattern: str) -> Iterator[tuple[str, str, str]]:
        """All (subject, relation, object) terms of a pattern over ?s ?p ?o, page by page.

        Raises KgrecError, in one line, for an endpoint that times out, refuses or answers something else.
        """
        offset = 0
        while True:
            query = f"SELECT ?s ?p ?o WHERE {{ {pattern} }} ORDER BY ?s ?p ?o LIMIT {_PAGE} OFFSET {offset}"
            rows = self._rows(self._ask(query))
            if not rows:
                return
            yield from rows
            offset += len(rows)

    def _ask(self, query: str) -> bytes:
        body = urllib.parse.urlencode({"query": query}).encode()
        request = urllib.request.Request(self.url, body, {
            "Accept": "application/sparql-results+json", "User-Agent": "kgrec",
            "Content-Type": "application/x-www-form-urlencoded"})
        found = ""
        for attempt in range(_TRIES):
            wait = self._wait * 4**attempt
            try:
                with urllib.request.urlopen(request, timeout=self._timeout) as answer:
                    return answer.read()
            except urllib.error.HTTPError as error:
                said = " ".join(error.read(300).decode("utf-8", "replace").split())[:120]
                found = f"HTTP {error.code} ({said or error.reason})"
                if error.code not in _PASSING:
                    raise KgrecError(f"{self.url}: found {found}, expected SPARQL results; check the address and that "
                                     "it takes SPARQL 1.1 queries by POST") from None
                asked = error.headers.get("Retry-After", "")
                wait = max(wait, min(float(asked), 60.0)) if asked.isdecimal() else wait
            except TimeoutError:
                found = f"no answer within {self._timeout:g} s"
            except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
                reason = getattr(error, "reason", error)
                found = f"no answer within {self._timeout:g} s" if isinstance(reason, TimeoutError) else f"{reason}"
            if attempt + 1 < _TRIES:
                time.sleep(wait)
        raise KgrecError(f"{self.url}: found {' '.join(found.split())} at each of {_TRIES} tries, expected SPARQL "
                         "results; try again later, with fewer --hops or with --relations")

    def _rows(self, answer: bytes) -> list[tuple[str, str, str]]:
        import pyoxigraph

        self._answers += 1
        try:
            solutions = list(pyoxigraph.parse_query_results(answer, format=pyoxigraph.QueryResultsFormat.JSON))
            rows = [tuple(self._term(solution[name]) for name in "spo") for solution in solutions]
        except (SyntaxError, ValueError, KeyError, TypeError) as error:
            start = " ".join(answer[:80].decode("utf-8", "replace").split())
            raise KgrecError(f"{self.url}: found {start!r} ({' '.join(str(error).split())[:120]}), expected SPARQL "
                             "results in JSON; check that the address is that of the endpoint itself") from None
        return rows

    def _term(self, term: object) -> str:
        """A term as N-Triples writes it; a blank node's label means something within its answer alone."""
        text = str(term)
        return f"_:r{self._answers}x{text[2:]}" if text[0] == "_" else text


def fetch(url: str, items: Sequence[str], path: Path, hops: int, relations: Sequence[str], languages: Sequence[str],
          tracker: Tracker, wait: float = 1.0, timeout: float = 60.0) -> list[str]:
    """Write what the endpoint knows around the items (terms) to `path`; returns lines that say what was asked.

    Triples that touch an entity fewer than `hops` steps from an item, and the literals of all that they name. A blank
    node ends a path: it has no name to ask for. Raises KgrecError where the endpoint fails.
    """
    endpoint = Endpoint(url, timeout, wait)
    kept = [f"<{r.strip('<>')}>" for r in relations]
    choice = f"VALUES ?p {{ {' '.join([*kept, SAME_AS])} }} " if kept else ""
    reached: dict[str, None] = {}
    frontier, named, used = list(items), dict.fromkeys(items), dict.fromkeys(kept)
    written: set[tuple[str, str, str]] = set()
    notes: list[str] = []
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for hop in range(hops):
            found: dict[str, None] = {}
            while frontier:  # owl:sameAs is no step
                reached |= dict.fromkeys(frontier)
                alias: dict[str, None] = {}
                for s, p, o in _around(endpoint, frontier, choice, tracker, hop + 1):
                    _write(file, written, s, p, o)
                    used[p] = None
                    (alias if p == SAME_AS else found).update({t: None for t in (s, o) if t[0] == "<" and t[1] != "<"})
                frontier = [e for e in alias if e not in reached]
            named |= dict.fromkeys([*reached, *found])
            frontier = [e for e in found if e not in reached]
            notes.append(f"step {hop + 1}: {len(written):,} triples, {len(named):,} entities")
        asked: dict[str, None] = {}
        named |= used
        while named:  # what is said of the entities, then what the relations of that are called
            asked |= named
            predicates: dict[str, None] = {}
            for s, p, o in _literals(endpoint, list(named), languages, tracker):
                _write(file, written, s, p, o)
                predicates[p] = None
            named = {p: None for p in predicates if p not in asked}
    if not written:
        raise KgrecError(f"{url}: found nothing about the {len(items):,} items (first: {items[0]}), expected triples; "
                         "check the IRIs of --items")
    return notes


def _write(file: IO[str], written: set[tuple[str, str, str]], s: str, p: str, o: str) -> None:
    if (s, p, o) not in written:
        written.add((s, p, o))
        file.write(f"{s} {p} {o} .\n")


def _around(endpoint: Endpoint, entities: Sequence[str], choice: str, tracker: Tracker,
            step: int) -> Iterator[tuple[str, str, str]]:
    with tracker.progress(f"step {step} (entities)", len(entities)) as bar:
        for batch in _batched(entities):
            for end in "so":
                values = f"VALUES ?{end} {{ {' '.join(batch)} }} {choice}"
                yield from endpoint.select(f"{values}?s ?p ?o FILTER(!isLiteral(?o))")
            bar.advance(len(batch))


def _literals(endpoint: Endpoint, subjects: Sequence[str], languages: Sequence[str],
              tracker: Tracker) -> Iterator[tuple[str, str, str]]:
    wanted = " || ".join(['lang(?o) = ""', *(f'langMatches(lang(?o), "{language}")' for language in languages)])
    with tracker.progress("names (entities)", len(subjects)) as bar:
        for batch in _batched(subjects):
            yield from endpoint.select(f"VALUES ?s {{ {' '.join(batch)} }} ?s ?p ?o "
                                       f"FILTER(isLiteral(?o) && ({wanted}))")
            bar.advance(len(batch))


def _batched(entities: Sequence[str]) -> Iterator[Sequence[str]]:
    return (entities[k:k + _BATCH] for k in range(0, len(entities), _BATCH))
