"""The peer of `kgrec bench graph`: PyKEEN, by an interpreter that has it; answers a line of JSON to each line it reads.

It needs nothing of this package. Its own training loops and evaluator do the work, with Adam, as its documentation
shows them: ComplEx against all entities over merged queries with inverse triples (LCWA), RotatE with one sampled
negative a positive (SLCWA), filtered ranks of test triples. Batches are timed inside the loops, after some to warm up.
"""

import argparse
import json
import sys

from peer_clock import clocks, peak_mb, say, since

try:
    import numpy as np
    import torch
    from pykeen.evaluation import RankBasedEvaluator
    from pykeen.models import model_resolver
    from pykeen.training import LCWATrainingLoop, SLCWATrainingLoop
    from pykeen.training.callbacks import TrainingCallback
    from pykeen.triples import CoreTriplesFactory
    from pykeen.version import get_version
except ImportError as error:
    print(json.dumps({"error": f"found an interpreter that cannot import PyKEEN ({error}), expected one with torch and "
                               f"pykeen; give another --peer-python or install them there"}))
    sys.exit(1)

WARM_UP = 2  # batches before the clock starts


class Enough(Exception):
    """The batches that were asked for are done."""


class Clock(TrainingCallback):
    """Stops a training loop after so many batches and holds their seconds."""

    def __init__(self, steps):
        super().__init__()
        self.left, self.steps = WARM_UP + steps, steps

    def post_batch(self, epoch, batch, **kwargs):
        """Counts a batch. An epoch's last batch may be short: callers ask for fewer batches than an epoch has."""
        self.left -= 1
        if self.left == self.steps:
            self.began = clocks()
        if not self.left:
            self.taken = since(self.began)
            raise Enough


def main() -> None:
    """Answers until the standard input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("file")
    for name in ("dim", "batch", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    peer = Peer(args)
    say({"program": f"PyKEEN {get_version()}, torch {torch.__version__}"})
    for line in sys.stdin:
        order = json.loads(line)
        say(getattr(peer, order["measure"])(order["count"]) | {"peak_mb": peak_mb()})


class Peer:
    """The graph, and the models that were trained on it so far."""

    def __init__(self, args):
        with np.load(args.file) as held:
            self.train, self.known, self.test = (torch.as_tensor(held[name].astype(np.int64))
                                                 for name in ("train", "known", "test"))
            self.sizes = {"num_entities": int(held["num_entities"]), "num_relations": int(held["num_relations"])}
        self.args, self.loops = args, {}

    def link(self, steps):
        """ComplEx, all entities as rivals: distinct (head, relation) queries, inverse ones included."""
        return self.batches("ComplEx", LCWATrainingLoop, steps, inverse=True, loss="crossentropy", regularizer=None)

    def sampled(self, steps):
        """RotatE, one sampled negative a positive."""
        return self.batches("RotatE", SLCWATrainingLoop, steps, inverse=False)

    def batches(self, name, kind, steps, inverse, **model):
        """So many batches of a training loop; the triples' own preparation is not timed."""
        if name not in self.loops:
            factory = CoreTriplesFactory(self.train, create_inverse_triples=inverse, **self.sizes)
            made = model_resolver.make(name, triples_factory=factory, embedding_dim=self.args.dim, random_seed=0,
                                       **model)
            optimizer = torch.optim.Adam(made.parameters(), lr=1e-3)
            # Without the search for a size of batches that fits in memory: this one is given.
            self.loops[name] = factory, made, kind(model=made, triples_factory=factory, optimizer=optimizer,
                                                   automatic_memory_optimization=False)
        factory, _, loop = self.loops[name]
        clock = Clock(steps)
        try:
            loop.train(triples_factory=factory, num_epochs=1, batch_size=self.args.batch, use_tqdm=False,
                       use_tqdm_batch=False, callbacks=clock)
        except Enough:
            return clock.taken | {"count": steps * self.args.batch}
        raise SystemExit(f"found fewer than {WARM_UP + steps} batches of {self.args.batch} in an epoch of {name}")

    def evaluation(self, triples):
        """Filtered ranks of the first test triples in both directions, by the ComplEx model."""
        _, model, _ = self.loops["ComplEx"]
        began = clocks()
        found = RankBasedEvaluator(filtered=True).evaluate(
            model, self.test[:triples], batch_size=256, use_tqdm=False, additional_filter_triples=[self.known])
        taken = since(began)
        mrr = found.get_metric("both.realistic.inverse_harmonic_mean_rank")
        return taken | {"count": 2 * len(self.test[:triples]), "mrr": float(mrr)}


if __name__ == "__main__":
    main()
