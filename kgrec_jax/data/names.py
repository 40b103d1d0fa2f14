"""Names for things that come with an identifier only."""

from __future__ import annotations

import re
import urllib.parse

# Freebase (`m.02822`, `/m/02822`, `g.11b6`), Wikidata (`Q42`), blank nodes, and long numbers such as WordNet's synsets.
_KEY = re.compile(r"/?[mg][./][0-9a-z_]+|[QPL]\d+|_:.*|[0-9a-f]{16,}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_NUMBER = re.compile(r"[a-z]?\d{5,}")
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def local_name(identifier: str) -> str:
    """The last part of an IRI, percent-decoded; any other identifier without a `kind/` prefix such as `entity/`."""
    if "://" in identifier or identifier.startswith("urn:"):
        whole = identifier.rstrip("#/:")
        tail = whole[max(whole.rfind("#"), whole.rfind("/"), whole.rfind(":")) + 1:]
        return urllib.parse.unquote(tail) if "%" in tail else tail
    return re.sub(r"^(entity|item|user|node)[/:](?=.)", "", identifier)


def is_key(identifier: str) -> bool:
    """Whether the identifier is plainly a key of some data base and says nothing to a reader."""
    return _is_key(identifier, local_name(identifier))


def name_from_id(identifier: str) -> str:
    """A readable name for an entity, "" where its identifier is opaque: its vector must speak for it then."""
    local = local_name(identifier)
    if _is_key(identifier, local) or _NUMBER.fullmatch(local):
        return ""
    return " ".join(local.replace("_", " ").split())


def _is_key(identifier: str, local: str) -> bool:
    return not identifier.strip() or _KEY.fullmatch(local) is not None


def relation_name(identifier: str) -> str:
    """A relation's identifier with underscores, dots, slashes and camel case split: `recordLabel` -> `record label`."""
    words = re.split(r"[\s_./\\]+", local_name(identifier))
    pieces = []
    for word in words:
        parts = _CAMEL.split(word)
        # In camel case a capital marks the border of a word, not a name; acronyms keep theirs.
        pieces += [p if len(parts) == 1 or (len(p) > 1 and p.isupper()) else p.lower() for p in parts]
    kept = [p for n, p in enumerate(pieces) if p and (n == 0 or p != pieces[n - 1])]
    return " ".join(kept) or identifier
