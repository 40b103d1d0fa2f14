"""The toy world: a small catalogue of films whose right answers are known, in English and in Chinese.

Each film has a genre, a director and a decade; each director comes from a country. Each user has one or two favourite
genres and two favourite directors, and touches films with the probabilities that `known_answer` returns. The texts name
what the graph says, so that text, graph and behaviour all lead to the same films. Some users and some films have no
history at all.
The two languages are twins: the same rows, identifiers, triples and interactions under other words.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from kgrec_jax.data.dataset import Dataset, Graph, Interactions
from kgrec_jax.data.texts import separator

_GENRES = {"en": ("comedy", "horror", "western", "romance", "war", "animation"),
           "zh": ("喜剧", "恐怖", "西部", "爱情", "战争", "动画")}
_COUNTRIES = {"en": ("France", "Japan", "Brazil", "Norway"), "zh": ("法国", "日本", "巴西", "挪威")}
_GIVEN = {"en": ("Anna", "Bruno", "Clara", "David"), "zh": ("王", "李", "张", "陈")}
_FAMILY = {"en": ("Lindqvist", "Moreau", "Tanaka"), "zh": ("晓明", "文静", "海涛")}
_THEMES = {"en": ("laughter and mistaken identities", "ghosts in an old house", "cowboys and dusty towns",
                  "lovers kept apart", "soldiers at the front", "talking animals"),
           "zh": ("误会和笑声", "老屋里的鬼魂", "牛仔和荒凉小镇", "被分开的恋人", "前线的士兵", "会说话的动物")}
_FIRST = {"en": ("Silent", "Golden", "Broken", "Distant", "Hidden", "Burning", "Frozen", "Last", "Secret", "Wild",
                 "Lonely", "Bright"),
          "zh": ("寂静的", "金色的", "破碎的", "遥远的", "隐秘的", "燃烧的", "冰冻的", "最后的", "秘密的", "狂野的", "孤独的", "明亮的")}
_SECOND = {"en": ("River", "Garden", "Mountain", "Letter", "Harbour", "Winter", "Mirror", "Train", "Island", "Bridge",
                  "Forest", "Road"),
           "zh": ("河流", "花园", "高山", "信", "港湾", "冬天", "镜子", "火车", "岛屿", "桥", "森林", "道路")}
_RELATIONS = {"en": ("genre", "director", "release decade", "country of origin"), "zh": ("类型", "导演", "上映年代", "国籍")}
_RELATION_IDS = ("genre", "director", "decade", "country")
_NUM_GENRES, _NUM_DIRECTORS, _NUM_DECADES, _NUM_COUNTRIES = 6, 12, 4, 4


@dataclasses.dataclass(frozen=True)
class _World:
    genre: np.ndarray  # [I]
    director: np.ndarray  # [I]
    decade: np.ndarray  # [I]
    country: np.ndarray  # [directors]
    fond_of_genre: np.ndarray  # [Nu, genres] bool
    fond_of_director: np.ndarray  # [Nu, directors] bool
    preference: np.ndarray  # [Nu, I] float64, rows sum to 1
    item_without_history: np.ndarray  # [I] bool
    user_without_history: np.ndarray  # [Nu] bool


def _draw(rng: np.random.Generator, num_users: int, num_items: int) -> _World:
    genre = rng.permutation(np.arange(num_items) % _NUM_GENRES)
    director = rng.permutation(np.arange(num_items) % _NUM_DIRECTORS)
    decade = rng.integers(0, _NUM_DECADES, num_items)
    country = rng.permutation(np.arange(_NUM_DIRECTORS) % _NUM_COUNTRIES)
    num_favourites = rng.integers(1, 3, num_users)
    rank_of_genre = np.argsort(rng.random((num_users, _NUM_GENRES)), 1).argsort(1)
    fond_of_genre = rank_of_genre < num_favourites[:, None]  # [Nu, genres]
    fond_of_director = np.argsort(rng.random((num_users, _NUM_DIRECTORS)), 1).argsort(1) < 2
    popularity = rng.normal(0.0, 0.5, num_items)
    logits = 3.0 * fond_of_genre[:, genre] + 2.0 * fond_of_director[:, director] + popularity  # [Nu, I]
    preference = np.exp(logits - logits.max(1, keepdims=True))
    preference /= preference.sum(1, keepdims=True)
    item_without = rng.permutation(num_items) < max(num_items // 12, 1)
    user_without = rng.permutation(num_users) < max(num_users // 20, 1)
    return _World(genre, director, decade, country, fond_of_genre, fond_of_director, preference, item_without,
                  user_without)


def _stream(seed: int, purpose: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(purpose,)))


def known_answer(seed: int = 0, num_users: int = 200, num_items: int = 120) -> np.ndarray:
    """[Nu, I] float64: how probably each user touches each film first; films and users without history have it too."""
    return _draw(_stream(seed, 0), num_users, num_items).preference


def toy_world(seed: int = 0, num_users: int = 200, num_items: int = 120,
              language: Literal["en", "zh"] = "en") -> Dataset:
    """A toy data set; `known_answer` of the same arguments tells what a perfect recommender would say."""
    world = _draw(_stream(seed, 0), num_users, num_items)
    interactions = _history(_stream(seed, 1), world)
    names, texts = _words(world, language)
    item_ids = tuple(f"film{i}" for i in range(num_items))
    graph = _graph(world, item_ids, names, texts, language)
    user_ids = tuple(f"user{u}" for u in range(num_users))
    return Dataset(f"toy-{language}", user_ids, item_ids, tuple(names), tuple(texts), interactions,
                   np.zeros(len(interactions), np.int8), has_fixed_split=False, has_fixed_valid=False,
                   has_timestamps=True, has_ratings=True, graph=graph, media={})


def _history(rng: np.random.Generator, world: _World) -> Interactions:
    """Distinct films per user, drawn one after another by preference (Gumbel noise), rated by how well they fit."""
    num_users, num_items = world.preference.shape
    with np.errstate(divide="ignore"):
        logits = np.log(np.where(world.item_without_history, 0.0, world.preference))
    order = np.argsort(-(logits + rng.gumbel(size=logits.shape)), 1)  # [Nu, I]
    most = int((~world.item_without_history).sum())
    lengths = np.where(world.user_without_history, 0, np.minimum(rng.integers(8, 25, num_users), most))
    user = np.repeat(np.arange(num_users), lengths)
    step = np.concatenate([np.arange(n) for n in lengths]) if len(user) else np.zeros(0, np.int64)
    item = order[user, step]
    genre, director = world.genre[item], world.director[item]
    liked = world.fond_of_genre[user, genre].astype(int) + world.fond_of_director[user, director]
    rating = np.clip(3 + liked + rng.integers(-1, 1, len(user)), 1, 5)
    start = 1_000_000_000 + rng.integers(0, 86_400 * 300, num_users)
    timestamp = start[user] + 3_600 * step + rng.integers(0, 3_600, len(user))
    return Interactions(user.astype(np.int32), item.astype(np.int32), rating.astype(np.float32),
                        timestamp.astype(np.int64))


def _director_names(language: str) -> list[str]:
    given, family = _GIVEN[language], _FAMILY[language]
    space = " " if language == "en" else ""
    return [f"{given[d % len(given)]}{space}{family[d // len(given)]}" for d in range(_NUM_DIRECTORS)]


def _words(world: _World, language: str) -> tuple[list[str], list[str]]:
    """Titles, all different, and texts that name what the graph says."""
    first, second = _FIRST[language], _SECOND[language]
    directors, genres, countries = _director_names(language), _GENRES[language], _COUNTRIES[language]
    titles, texts = [], []
    for i, (genre, director, decade) in enumerate(zip(world.genre, world.director, world.decade, strict=True)):
        volume, pair = divmod(i, len(first) * len(second))
        # The step of 7 mixes the words: neighbours in the table share neither, and none tells the genre.
        word = first[pair * 7 % len(first)], second[(pair // len(first) + pair) % len(second)]
        country, theme, year = countries[world.country[director]], _THEMES[language][genre], 1980 + 10 * decade
        if language == "en":
            title = f"The {word[0]} {word[1]}" + (f" {volume + 1}" if volume else "")
            text = (f"{title}. A {genres[genre]} film of the {year}s about {theme}, "
                    f"directed by {directors[director]} from {country}.")
        else:
            title = f"{word[0]}{word[1]}" + (f"{volume + 1}" if volume else "")
            text = (f"{title}{separator(title)}{year}年代的{genres[genre]}电影，讲述{theme}，"
                    f"由来自{country}的{directors[director]}执导。")
        titles.append(title)
        texts.append(text)
    return titles, texts


def _graph(world: _World, item_ids: tuple[str, ...], names: list[str], texts: list[str], language: str) -> Graph:
    num_items = len(item_ids)
    kinds = (("genre", _GENRES[language]), ("director", _director_names(language)),
             ("decade", tuple(f"{1980 + 10 * d}{'s' if language == 'en' else '年代'}" for d in range(_NUM_DECADES))),
             ("country", _COUNTRIES[language]))
    ids, entity_names, start = list(item_ids), list(names), {}
    for kind, kind_names in kinds:
        start[kind] = len(ids)
        ids += [f"{kind}{n}" for n in range(len(kind_names))]
        entity_names += kind_names
    films = np.arange(num_items)
    facts = (("genre", world.genre), ("director", world.director), ("decade", world.decade))
    blocks = [np.stack([films, np.full(num_items, r), start[kind] + values], 1)  # [I, 3]
              for r, (kind, values) in enumerate(facts)]
    directors = start["director"] + np.arange(_NUM_DIRECTORS)
    blocks.append(np.stack([directors, np.full(_NUM_DIRECTORS, 3), start["country"] + world.country], 1))
    triples = np.concatenate(blocks).astype(np.int32)
    entity_texts = (*texts, *("" for _ in entity_names[num_items:]))
    return Graph(tuple(ids), tuple(entity_names), entity_texts, _RELATION_IDS, _RELATIONS[language], triples, num_items,
                 np.zeros(len(triples), np.int8))
