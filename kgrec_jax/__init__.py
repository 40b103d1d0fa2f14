"""kgrec_jax: a recommender that reads text, knows a graph and remembers behaviour.

The alphabet of shapes, used in every trailing comment of the package:

    B  examples of a batch      L  tokens of a text          H  items of a history
    D  width of a vector        I  items                     N  entities (rows 0 … I-1 are the items)
    R  relations                T  triples                   Nu users
    P  parts of a score         K  length of a list          E  edges of the graph
"""

from kgrec_jax.errors import Interrupted, KgrecError

__version__ = "0.1.0"
__all__ = ["Interrupted", "KgrecError", "Recommender", "run"]


def __getattr__(name: str):
    # JAX takes most of a second to import: the two doors open it only when they are used.
    if name == "run":
        from kgrec_jax.pipeline import run

        return run
    if name == "Recommender":
        from kgrec_jax.serving.recommender import Recommender

        return Recommender
    raise AttributeError(f"module 'kgrec_jax' has no attribute {name!r}")
