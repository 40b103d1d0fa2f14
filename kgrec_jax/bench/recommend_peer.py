"""The peer of `kgrec bench recommend`: RecBole, by an interpreter that has it; lines of JSON on the standard output.

It needs nothing of this package. RecBole's own data sets, trainers and evaluator do the work, by RecBole's defaults.
Two of its models import packages that have no build for a recent Python; what those are asked for is a few lines of
torch and scipy, put in their place here. No package is edited.
"""

import argparse
import json
import os
import sys
import types
import warnings

from peer_clock import clocks, peak_mb, say, since

warnings.filterwarnings("ignore")
os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # RecBole pickles its configuration into a checkpoint
try:
    import numpy as np
    import scipy.sparse as sp
    import torch
    from recbole import __version__ as recbole_version
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.data.interaction import Interaction
    from recbole.utils import get_model, get_trainer, init_seed
except (ImportError, AttributeError) as error:  # a NumPy that is too new for RecBole lacks attributes
    print(json.dumps({"error": f"found an interpreter that cannot import RecBole ({error}), expected one with "
                               'torch==2.13.0, then recbole==1.2.1 "numpy<2" "pandas<3" "setuptools<81"; give another '
                               "--peer-python or install them there"}))
    sys.exit(1)

NAMES = {"kgat": "KGAT", "kgin": "KGIN", "lightgcn": "LightGCN", "bpr": "BPR"}
PARTS = ("train", "valid", "test")
SEED = 2020  # RecBole's default


class Enough(Exception):
    """The processor seconds that training may take are spent."""


def main() -> None:
    """Says hello, trains one model, or ranks by given factors."""
    parser = argparse.ArgumentParser()
    parser.add_argument("order", choices=("hello", "train", "rank"))
    parser.add_argument("file", help="arrays of the data set, .npz")
    parser.add_argument("folder", help="a folder for RecBole's files")
    parser.add_argument("--model", choices=tuple(NAMES), default="bpr")
    parser.add_argument("--epochs", type=int, default=0)
    parser.add_argument("--cpu", type=float, default=0.0)
    parser.add_argument("--batch", type=int, default=0)
    parser.add_argument("--scores", default="")
    args = parser.parse_args()
    torch.set_num_threads(1)
    say({"program": f"RecBole {recbole_version}, torch {torch.__version__}"})
    if args.order == "hello":
        say({"result": {}})
        return
    with np.load(args.file) as held:
        world = dict(held)
    say({"result": {**(train if args.order == "train" else rank)(args, world), "peak_mb": peak_mb()}})


def train(args, world):
    """Training until RecBole stops by itself, an epoch a line; then both held-out parts by the best epoch's weights.

    `valid` is of the vectors that the test and the scores are of. It may differ from the best epoch's figure: KGIN
    drops edges at random when it ranks, too.
    """
    put_in_place(args.model)
    began = clocks()
    config, dataset, parts = prepare(args, world, {"metrics": ["NDCG"], "topk": [10], "valid_metric": "NDCG@10"})
    model = get_model(config["model"])(config, parts[0]._dataset).to(config["device"])
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    made = since(began)
    curve, spent, train_epoch = [], [0.0, 0.0], trainer._train_epoch

    def timed_epoch(*values, **named):
        start = clocks()
        try:
            return train_epoch(*values, **named)
        finally:
            taken = since(start)
            spent[0] += taken["cpu_s"]
            spent[1] += taken["seconds"]

    def told(epoch, score):
        row = {"epoch": epoch + 1, "ndcg@10": float(score), "train_cpu_s": spent[0],
               "cpu_s": since(start)["cpu_s"]}  # with validation, as RecBole has it after each epoch
        curve.append(row)
        say(row)
        if args.cpu and row["cpu_s"] * (len(curve) + 1) / len(curve) > args.cpu:
            raise Enough

    trainer._train_epoch, start = timed_epoch, clocks()
    try:
        trainer.fit(*parts[:2], verbose=False, saved=True, show_progress=False, callback_fn=told)
        stopped = "epochs" if len(curve) == config["epochs"] else "patience"
    except Enough:
        stopped = "cap"
    fitted = since(start)
    back_to_best(model, trainer.saved_model_file)
    valid, test = (trainer.evaluate(part, load_best_model=False, show_progress=False) for part in parts[1:])
    if args.scores:
        np.save(args.scores, scores_of(model, dataset, world))
    best = max(curve, key=lambda row: row["ndcg@10"])
    return {"curve": curve, "best": best, "stopped": stopped, "valid": float(valid["ndcg@10"]),
            "test": float(test["ndcg@10"]), "prepare": made, "fit": fitted,
            "params": sum(p.numel() for p in model.parameters() if p.requires_grad)}


def back_to_best(model, file):
    """The weights of the best epoch, and the vectors that were made of them.

    RecBole's own way back leaves KGIN with the vectors of the last epoch, which it then ranks by; KGAT's, whose
    attention is not saved, are in the file.
    """
    held = torch.load(file, weights_only=False)
    os.remove(file)
    model.load_state_dict(held["state_dict"])
    for name in ("restore_user_e", "restore_entity_e", "restore_item_e"):
        if hasattr(model, name):
            setattr(model, name, None)
    model.load_other_parameter(held.get("other_parameter"))


def rank(args, world):
    """RecBole's evaluation of a BPR model with given factors: seconds of `Trainer.evaluate`, and its figures."""
    more = {"metrics": ["Recall", "NDCG", "MRR", "Hit", "Precision", "MAP"], "topk": [10, 20],
            "valid_metric": "NDCG@10", "embedding_size": int(world["user_factors"].shape[1])}
    if args.batch:
        more["eval_batch_size"] = args.batch
    config, dataset, parts = prepare(args, world, more)
    model = get_model(config["model"])(config, parts[0]._dataset).to(config["device"])
    with torch.no_grad():
        for table, field, factors in ((model.user_embedding, dataset.uid_field, world["user_factors"]),
                                      (model.item_embedding, dataset.iid_field, world["item_factors"])):
            table.weight[rows(dataset, field, len(factors))] = torch.as_tensor(factors)
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    trainer.eval_collector.data_collect(parts[0])
    before, began = peak_mb(), clocks()
    found = trainer.evaluate(parts[2], load_best_model=False, show_progress=False)
    return {**since(began), "before_mb": before, "batch": int(config["eval_batch_size"]),
            "metrics": {name: float(value) for name, value in found.items()}}


def prepare(args, world, more):
    """(configuration, data set, its training, validation and test loaders) of the arrays, written as atomic files."""
    graph = "triples" in world and NAMES[args.model] in ("KGAT", "KGIN")
    write(args.folder, world, graph)
    load = {"inter": ["user_id", "item_id"]}
    if graph:
        load.update(kg=["head_id", "relation_id", "tail_id"], link=["item_id", "entity_id"])
    settings = {"data_path": args.folder, "benchmark_filename": list(PARTS), "load_col": load, "seed": SEED,
                "use_gpu": False, "show_progress": False, "state": "ERROR", "metric_decimal_place": 12,
                "checkpoint_dir": os.path.join(args.folder, "saved"),
                "eval_args": {"split": {"RS": [0.8, 0.1, 0.1]}, "group_by": "user", "order": "RO", "mode": "full"},
                **({"epochs": args.epochs} if args.epochs else {}), **more}
    sys.argv[1:] = []  # RecBole reads the command line by itself
    os.chdir(args.folder)  # where it leaves its logs
    config = Config(model=NAMES[args.model], dataset="world", config_dict=settings)
    init_seed(config["seed"], config["reproducibility"])
    dataset = create_dataset(config)
    # RecBole leaves out interactions of unlinked items without a word: then nothing here would be like for like.
    if len(dataset.inter_feat) != sum(len(world[name]) for name in PARTS):
        raise SystemExit(f"found {len(dataset.inter_feat)} interactions after RecBole read them, expected all")
    parts = data_preparation(config, dataset)
    init_seed(config["seed"], config["reproducibility"])
    return config, dataset, parts


def write(folder, world, graph):
    """RecBole's atomic files; a user, item, entity or relation is called by its row."""
    base = os.path.join(folder, "world")
    os.makedirs(base, exist_ok=True)

    def table(ending, header, *columns):
        with open(os.path.join(base, f"world.{ending}"), "w", encoding="utf-8") as file:
            file.write("\t".join(f"{name}:token" for name in header) + "\n")
            file.writelines("\t".join(map(str, row)) + "\n" for row in zip(*(c.tolist() for c in columns)))

    for name in PARTS:
        table(f"{name}.inter", ("user_id", "item_id"), *world[name].T)
    if graph:
        table("kg", ("head_id", "relation_id", "tail_id"), *world["triples"].T)
        items = np.arange(int(world["num_items"]))
        table("link", ("item_id", "entity_id"), items, items)


def rows(dataset, field, count):
    """RecBole's rows of the first `count` users or items of the arrays."""
    return torch.as_tensor(dataset.token2id(field, [str(n) for n in range(count)]))


def scores_of(model, dataset, world):
    """[users, items] float32 of the model, in the order of the arrays."""
    users, items = (rows(dataset, field, int(world[name])) for field, name in
                    ((dataset.uid_field, "num_users"), (dataset.iid_field, "num_items")))
    model.eval()
    with torch.no_grad():
        found = model.full_sort_predict(Interaction({dataset.uid_field: users})).view(len(users), -1)
    return found[:, items].numpy().astype(np.float32)


# --- what RecBole's models ask of packages that are not there -------------------------------------------------------


def put_in_place(model):
    """Stand-ins for `dgl` (KGAT), `torch_scatter` (KGIN) and a method that newer scipy no longer has."""
    if not hasattr(sp.dok_matrix, "_update"):
        sp.dok_matrix._update = lambda matrix, entries: matrix._dict.update(entries)
    if model == "kgat":
        module = types.ModuleType("dgl")
        module.graph = lambda ends: EdgeList(*ends)
        module.edge_subgraph = lambda graph, chosen, **named: EdgeList(graph.ends[0][chosen], graph.ends[1][chosen],
                                                                       graph.size)
        sys.modules["dgl"] = module
    if model == "kgin":
        module = types.ModuleType("torch_scatter")
        module.scatter_mean = scatter_mean
        sys.modules["torch_scatter"] = module


class EdgeList:
    """The part of a DGL graph that RecBole's KGAT looks at: edges, their data, a choice of them, a sparse matrix."""

    def __init__(self, source, target, size=0):
        self.ends, self.edata = (source, target), {}
        self.size = size or int(torch.stack((source, target)).max()) + 1

    def filter_edges(self, wanted):
        """Places of the edges for which `wanted` is true."""
        return wanted(types.SimpleNamespace(data=self.edata)).nonzero().flatten()

    def adjacency_matrix(self, **named):
        """Sources by targets, as scipy has it."""
        source, target = (end.numpy() for end in self.ends)
        return sp.coo_matrix((np.ones(len(source)), (source, target)), shape=(self.size, self.size))


def scatter_mean(src, index, dim=0, dim_size=None):
    """The mean of the rows of each index, zeros for one without rows."""
    if dim != 0:
        raise NotImplementedError("dim other than 0")
    size = dim_size or int(index.max()) + 1
    sums = torch.zeros(size, src.shape[1], dtype=src.dtype).index_add(0, index, src)
    return sums / torch.bincount(index, minlength=size).clamp(min=1)[:, None]


if __name__ == "__main__":
    main()
