"""Surface forms as extracted from text, and the keys under which they are one: case, articles, inflection aside.

Only what is safe without a dictionary is done, and only to words in Latin letters: forms in Chinese, Korean or any
other script keep every character, but for width and composition (Unicode NFKC) and punctuation around them.
"""

from __future__ import annotations

import re
import unicodedata

_ARTICLES = ("the", "a", "an")
_PRONOUNS = frozenset("i you he she it we they me him her us them this that these those who which what there someone "
                      "something everyone 我 你 他 她 它 我们 你们 他们 她们 它们 这 那 그 그녀 그들 이것 그것".split())
_BE = frozenset("is are was were be been being am".split())
_HAVE, _DO = frozenset(("has", "have", "had", "having")), frozenset(("do", "does", "did"))
_FILLERS = frozenset("the a an also then just really very currently originally later first recently famously".split())
_IRREGULAR = {form: base for base, forms in {
    "write": "wrote written", "make": "made", "sing": "sang sung", "win": "won", "lead": "led", "found": "founded",
    "become": "became", "begin": "began begun", "bear": "born borne bore", "buy": "bought", "sell": "sold",
    "give": "gave given", "take": "took taken", "know": "knew known", "hold": "held", "teach": "taught",
    "meet": "met", "marry": "married", "die": "died", "build": "built", "draw": "drew drawn", "leave": "left",
    "play": "played", "shoot": "shot", "run": "ran", "own": "owned", "speak": "spoke spoken", "star": "starred",
    }.items() for form in (*forms.split(), base)}


def shown(text: str) -> str:
    """The form as people read it: NFKC, one line, without quotes and stops around it."""
    text = " ".join(unicodedata.normalize("NFKC", text).split())
    return text.strip("\"'“”‘’«»„`,;:").removesuffix("。").strip() or text


def entity_key(text: str) -> str:
    """What forms of one entity have in common, "" for a form without content (an article, a pronoun).

    Case, punctuation, apostrophes and a leading article are dropped; `+` and `#` stay (C, C++ and C# are three things).
    A form of nothing but punctuation is its own key.
    """
    text = shown(text).casefold()
    words = _words(text)
    if len(words) > 1 and words[0] in _ARTICLES:
        words = words[1:]
    if len(words) == 1 and (words[0] in _PRONOUNS or words[0] in _ARTICLES[:1]):
        return ""
    return " ".join(words) or text


def relation_key(text: str) -> str:
    """What forms of one relation have in common: `was directed by`, `is directed by` and `directed by` are one.

    Forms of be, have and do before another word, articles and a few adverbs are dropped, and inflected English words
    are cut to a stem. Prepositions and negations stay: `directed` is not `directed by`, `did not win` is not `won`.
    """
    words = _words(re.sub(r"[_/.]", " ", re.sub(r"n['’]t\b", " not", shown(text).casefold())))
    kept = [word for word in words if word not in _FILLERS] or words
    while len(kept) > 1 and (kept[0] in _BE or kept[0] in _DO or kept[0] in _HAVE and _is_participle(kept[1])):
        kept = kept[1:]
    kept = [word for n, word in enumerate(kept) if n == 0 or word not in _BE] or kept
    return " ".join(map(_stem, kept))


def _words(text: str) -> list[str]:
    text = re.sub(r"['’`]", "", text)
    return "".join(c if c in "+#" or unicodedata.category(c)[0] not in "PSZC" else " " for c in text).split()


def _is_participle(word: str) -> bool:
    return word in _BE or word == "not" or word in _IRREGULAR or word.endswith(("ed", "en"))


def _stem(word: str) -> str:
    """A key for inflected forms of an English word; no word itself."""
    if not (word.isascii() and word.isalpha()) or len(word) < 3:
        return word
    word = _IRREGULAR.get(word, word)
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith("ied") and len(word) > 4:
        return word[:-3] + "y"
    for ending in ("ing", "ed", "es", "s"):
        stem = word[:-len(ending)]
        whole = word.endswith(("ss", "us", "is")) or len(stem) < 3 or not re.search("[aeiouy]", stem)
        if word.endswith(ending) and not whole:
            if ending in ("ing", "ed") and stem[-1] == stem[-2] and stem[-1] not in "lsz":
                stem = stem[:-1]
            word = stem
            break
    return word[:-1] if word.endswith("e") and len(word) > 3 else word
