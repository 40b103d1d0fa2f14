"""The only training loop. It takes functions and knows no model."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kgrec_jax.checkpoint import Checkpoints
from kgrec_jax.data import loader
from kgrec_jax.errors import Interrupted, KgrecError
from kgrec_jax.optim import accumulated, ema_update
from kgrec_jax.machine import cpu_threads
from kgrec_jax.sharding import Rules, put, put_batch, shardings
from kgrec_jax.tracking import Tracker

# A metric is a number, or a (sum, count) pair whose mean is taken over all batches and devices of a logged interval.
Metrics = Mapping[str, Any]
InitFn = Callable[[jax.Array], Any]  # key -> params
LossFn = Callable[[Any, Any, Any, jax.Array], tuple[jax.Array, Metrics]]  # params, constants, batch, key


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step changes."""

    step: jax.Array  # [] int32, steps done
    params: Any
    opt_state: Any
    average: Any = ()  # moving average of the parameters where one is asked for


@dataclasses.dataclass(frozen=True)
class FitResult:
    """What a training run leaves."""

    params: Any  # (their moving average with `ema`) of the last step, or of the best evaluation with keep="best"
    steps: int  # steps done
    seconds: float  # in the loop, over all sessions of the run
    metrics: dict[str, float]  # last logged and last evaluated (of the best evaluation with keep="best")
    stopped: Literal["end", "patience"]


def make_step(loss_fn: LossFn, tx: optax.GradientTransformation, key: jax.Array, accumulate: int = 1,
              ema: float = 0.0) -> Callable:
    """The train step (state, constants, batch) -> (state, {name: (sum, count)}), a pure function.

    The key of a step is `fold_in(key, step)`, so that a resumed run draws what an uninterrupted one draws.
    """
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True) if accumulate == 1 else accumulated(loss_fn, accumulate)

    def step(state: TrainState, constants: Any, batch: Any) -> tuple[TrainState, dict]:
        step_key = jax.random.fold_in(key, state.step)
        (loss, metrics), grads = grad_fn(state.params, constants, batch, step_key)
        with jax.numpy_dtype_promotion("standard"):  # Optax's Adam and schedules mix weak and strong types
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            norm = optax.tree.norm(grads)
        metrics = {"loss": loss, **metrics, "grad_norm": norm}
        learning_rates = optax.tree_utils.tree_get_all_with_path(opt_state, "learning_rate")
        if learning_rates:
            metrics["learning_rate"] = learning_rates[0][1]
        pairs = {name: value if isinstance(value, tuple) else (value, jnp.ones(())) for name, value in metrics.items()}
        average = ema_update(state.average, params, state.step + 1, ema) if ema else state.average
        return TrainState(state.step + 1, params, opt_state, average), pairs

    return step


def fit(
    *,
    workdir: pathlib.Path,
    init_fn: InitFn,
    loss_fn: LossFn,
    constants: Any,
    source: loader.Source,
    tx: optax.GradientTransformation,
    seed: int,
    mesh: Mesh,
    rules: Rules,
    log_every: int,
    checkpoint_every: int,
    evaluate: Callable[[Any], dict[str, float]] | None = None,
    eval_every: int = 0,
    keep: Literal["last", "best"] = "last",
    best_metric: str = "",
    patience: int = 0,
    accumulate: int = 1,
    ema: float = 0.0,
    tell: bool = False,
    label: str,
    tracker: Tracker,
) -> FitResult:
    """Trains for `len(source)` steps, one batch `source[step]` each, and leaves checkpoints and metrics in `workdir`.

    The same call on the same folder goes on after the last checkpoint, bit for bit on the same mesh and number of
    threads; a finished folder is read and returned without compiling. `constants` (a pytree, placed by `rules` like the
    parameters) reach the loss as an argument and are neither trained nor saved. `evaluate(params)` runs every
    `eval_every` steps (0: only at the end) and after the last. keep="best" returns the parameters with the highest
    `best_metric` of an evaluation ("-name": the lowest), the earliest of equals; `patience` evaluations in a row
    without a better one end the run (0: never). A batch is taken in `accumulate` parts (`optim.accumulated`); with
    `ema` > 0 a moving average of the parameters is kept with that decay, evaluated and returned in their place.
    `tell`: evaluations begin before the first step, and each is said. All of it happens under `jax.set_mesh(mesh)`.

    Raises KgrecError where the loss is not finite or the folder is of another run, Interrupted after Ctrl-C or SIGTERM
    once the state is saved.
    """
    if (keep == "best" or patience) and not (evaluate and best_metric):
        raise KgrecError(f"{label}: keep='best' and patience need evaluate and best_metric; give both")
    if accumulate < 1 or not 0.0 <= ema < 1.0:
        raise KgrecError(f"{label}: found accumulate {accumulate} and ema {ema}, expected at least 1 part of a batch "
                         "and a decay from 0 to below 1")
    loop = _Loop(workdir=pathlib.Path(workdir), init_fn=init_fn, loss_fn=loss_fn, constants=constants, source=source,
                 tx=tx, seed=seed, mesh=mesh, rules=rules, log_every=log_every, checkpoint_every=checkpoint_every,
                 evaluate=evaluate, eval_every=eval_every, keep=keep, best_metric=best_metric, patience=patience,
                 accumulate=accumulate, ema=ema, tell=tell, label=label, tracker=tracker.at(workdir))
    with jax.set_mesh(mesh), Checkpoints(loop.workdir / "checkpoints") as checkpoints, contextlib.closing(loop.tracker):
        return loop.run(checkpoints)


@dataclasses.dataclass
class _Progress:
    """What a run knows about itself beside its arrays; saved as JSON with every checkpoint."""

    num_steps: int
    seed: int
    devices: str  # the mesh and the threads, on which bit-exactness depends
    position: int = 0  # of the loader: the step whose batch comes next
    seconds: float = 0.0
    sums: dict[str, list[float]] = dataclasses.field(default_factory=dict)  # (sum, count) since the last logged row
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)  # last logged and evaluated
    best: float | None = None  # value of the best evaluation, higher is better
    best_step: int = -1
    best_metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    since_best: int = 0  # evaluations without a better one
    stopped: str = ""  # "end" or "patience" once the run is over


@dataclasses.dataclass(frozen=True)
class _Loop:
    """The arguments of `fit`, and its parts."""

    workdir: pathlib.Path
    init_fn: InitFn
    loss_fn: LossFn
    constants: Any
    source: loader.Source
    tx: optax.GradientTransformation
    seed: int
    mesh: Mesh
    rules: Rules
    log_every: int
    checkpoint_every: int
    evaluate: Callable[[Any], dict[str, float]] | None
    eval_every: int
    keep: str
    best_metric: str
    patience: int
    accumulate: int
    ema: float
    tell: bool
    label: str
    tracker: Tracker

    def run(self, checkpoints: Checkpoints) -> FitResult:
        """Resumes or begins, trains to the end, returns the parameters to keep."""
        init_key, step_key = jax.random.split(jax.random.key(self.seed))
        latest = checkpoints.latest
        progress = self._resume(checkpoints, latest)
        if progress.stopped:
            return self._result(checkpoints, progress, latest, None)
        if latest is None:
            state, places = self._begin(init_key)
        else:
            abstract = jax.eval_shape(self._init, init_key)
            places = shardings(abstract, self.mesh, self.rules)
            state = TrainState(**{"average": (), **checkpoints.load(latest, _tree(_placed(abstract, places)))})
        constants = put(self.constants, shardings(self.constants, self.mesh, self.rules))
        replicated = NamedSharding(self.mesh, PartitionSpec())
        step = jax.jit(make_step(self.loss_fn, self.tx, step_key, self.accumulate, self.ema), donate_argnums=0,
                       out_shardings=(places, replicated))
        if latest is None and self.tell and self.evaluate is not None:
            self._evaluate(progress, 0, self._kept(state), begin=True)
        return self._train(checkpoints, progress, state, constants, step)

    def _train(self, checkpoints: Checkpoints, progress: _Progress, state: TrainState, constants: Any,
               step: Callable) -> FitResult:
        done, total = progress.position, progress.num_steps
        clock, pending = _Clock(progress.seconds), None  # pending: metrics of a step that the device may still be at
        with (stop_on_signal() as stop, self.tracker.progress(self.label, total, done) as bar,
              contextlib.closing(loader.iterate(self.source, done)) as batches):
            while not progress.stopped:
                if done < total:
                    batch = next(batches)
                    state, metrics = step(state, constants, put_batch(batch, self.mesh))
                    self._collect(progress, pending)  # of the step before, while the device is at this one
                    done += 1
                    pending = done, metrics
                    progress.position = int(batches.get_state()["next_index"])
                    clock.examples += _batch_size(batch)
                    bar.advance(1, **_shown(progress.metrics))
                last, stopping = done == total, stop(done)
                evaluates = self.evaluate is not None and (last or _due(done, self.eval_every))
                saves = last or stopping or _due(done, self.checkpoint_every)
                logs = last or _due(done, self.log_every)
                if logs or evaluates or saves:
                    self._collect(progress, pending)
                    pending = None
                if logs:
                    self._log(progress, done, clock)
                better = evaluates and self._evaluate(progress, done, self._kept(state))
                if last or (self.patience and progress.since_best >= self.patience):
                    progress.stopped = "end" if last else "patience"
                if saves or better or progress.stopped:
                    progress.seconds = clock.seconds()
                    checkpoints.save(done, _tree(state), dataclasses.asdict(progress), progress.best_step)
                if stopping and not progress.stopped:
                    checkpoints.wait()
                    raise Interrupted(f"{self.label}: stopped at step {done} of {total}; "
                                      "the same command goes on from there")
        checkpoints.wait()
        return self._result(checkpoints, progress, done, self._kept(state))

    def _kept(self, state: TrainState) -> Any:
        """The parameters that are evaluated and returned."""
        return state.average if self.ema else state.params

    def _resume(self, checkpoints: Checkpoints, latest: int | None) -> _Progress:
        """What the folder's last checkpoint knows, or a beginning; metrics that are ahead of it are cut off."""
        now = _Progress(len(self.source), self.seed, _describe(self.mesh))
        self.tracker.resume_from(-1 if latest is None else latest)  # an evaluation before the first step is row 0
        if latest is None:
            return now
        then = _Progress(**checkpoints.load_meta(latest))
        for name in ("num_steps", "seed"):
            if getattr(then, name) != getattr(now, name):
                raise KgrecError(f"{self.workdir}: found checkpoints of a run with {name} {getattr(then, name)}, "
                                 f"expected {getattr(now, name)}; use another folder or the settings it was begun with")
        if not then.stopped:
            self.tracker.say(f"{self.label}: goes on after step {latest} of {len(self.source)}")
            if then.devices != now.devices:
                self.tracker.say(f"{self.label}: begun on {then.devices}, goes on with {now.devices}: the result "
                                 "agrees with an uninterrupted run's up to rounding, not bit for bit")
        return dataclasses.replace(then, devices=now.devices)

    def _init(self, key: jax.Array) -> TrainState:
        params = self.init_fn(key)
        with jax.numpy_dtype_promotion("standard"):
            # Adding zero makes an array of its own: two that are one could not both be donated.
            average = jax.tree.map(lambda p: p + jnp.zeros((), p.dtype), params) if self.ema else ()
            return TrainState(jnp.zeros((), jnp.int32), params, self.tx.init(params), average)

    def _begin(self, key: jax.Array) -> tuple[TrainState, Any]:
        """The first state, each array made where it will live, and these places.

        Given weights (a pretrained encoder) enter the program as arguments: as constants inside it, XLA would take
        seconds and twice the memory over them.
        """
        closed, shape = jax.make_jaxpr(self._init, return_shape=True)(key)
        places = shardings(shape, self.mesh, self.rules)
        leaves, tree = jax.tree.flatten(places)
        init = jax.jit(lambda consts, key: jax.core.eval_jaxpr(closed.jaxpr, consts, key), out_shardings=leaves)
        return jax.tree.unflatten(tree, init([_on_mesh(c, self.mesh) for c in closed.consts], key)), places

    def _collect(self, progress: _Progress, pending: tuple[int, Any] | None) -> None:
        """Adds one step's metrics to the interval; a loss that is not finite ends the run before it is saved."""
        if pending is None:
            return
        step, metrics = pending
        for name, (total, count) in jax.device_get(metrics).items():
            sums = progress.sums.setdefault(name, [0.0, 0.0])
            sums[0] += float(total)
            sums[1] += float(count)
            if name == "loss" and not np.isfinite(total):
                raise KgrecError(f"{self.label}: found loss {float(total)} at step {step} of {progress.num_steps}, "
                                 "expected a finite number; lower optim.peak_lr or optim.clip_norm, in a new folder")

    def _log(self, progress: _Progress, step: int, clock: _Clock) -> None:
        row = {name: total / count for name, (total, count) in progress.sums.items() if count}
        progress.sums = {}
        progress.metrics.update(row)
        self.tracker.metrics(step, {**row, "examples_per_second": clock.lap()})

    def _evaluate(self, progress: _Progress, step: int, params: Any, begin: bool = False) -> bool:
        """Evaluates after a step; True where this is the best evaluation so far and is to be kept."""
        values = {name: float(value) for name, value in self.evaluate(params).items()}
        progress.metrics.update(values)
        self.tracker.metrics(step, values)
        if self.tell:
            said = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items())
            self.tracker.say(f"{self.label}: step {step} of {progress.num_steps}: {said}")
        if begin or not self.best_metric:
            return False
        name = self.best_metric.removeprefix("-")
        if name not in values:
            raise KgrecError(f"{self.label}: found best_metric {name}, expected one of {', '.join(sorted(values))}")
        value = -values[name] if self.best_metric.startswith("-") else values[name]
        if np.isfinite(value) and (progress.best is None or value > progress.best):
            progress.best, progress.best_step, progress.since_best = value, step, 0
            progress.best_metrics = dict(progress.metrics)
            return self.keep == "best"
        progress.since_best += 1
        return False

    def _result(self, checkpoints: Checkpoints, progress: _Progress, done: int, params: Any | None) -> FitResult:
        """The parameters to keep, from the disk where they are not at hand."""
        best = self.keep == "best" and progress.best_step >= 0
        step = progress.best_step if best else done
        if params is None or step != done:
            abstract = jax.eval_shape(self.init_fn, jax.random.key(self.seed))
            name = "average" if self.ema else "params"
            tree = {name: abstract}
            params = checkpoints.load(step, _placed(tree, shardings(tree, self.mesh, self.rules)), part=True)[name]
        metrics = progress.best_metrics if best else progress.metrics
        return FitResult(params, done, progress.seconds, dict(metrics), progress.stopped)


class _Clock:
    """Seconds of the run over all its sessions, and examples a second since the last lap."""

    def __init__(self, before: float):
        self._before, self._began = before, time.monotonic()
        self._lap, self.examples = self._began, 0

    def seconds(self) -> float:
        return self._before + time.monotonic() - self._began

    def lap(self) -> float:
        now = time.monotonic()
        rate = self.examples / max(now - self._lap, 1e-9)
        self._lap, self.examples = now, 0
        return rate


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Callable[[int], bool]]:
    """Yields a function of the step that tells whether Ctrl-C or SIGTERM has come; a second one acts at once.

    Of several processes all stop at the same step, after a SIGTERM to any of them (JAX's preemption service). Outside
    the main thread signals are left alone.
    """
    came = threading.Event()
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False
        return
    before = {}

    def handle(number, frame):
        del frame
        came.set()
        signal.signal(number, before[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.getsignal(number)
        signal.signal(number, handle)
    try:
        yield lambda step: came.is_set()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tree(state: TrainState) -> dict:
    tree = {"step": state.step, "params": state.params, "opt_state": state.opt_state}
    return {**tree, "average": state.average} if jax.tree.leaves(state.average) else tree


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _placed(abstract: Any, places: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, places)


def _on_mesh(x: Any, mesh: Mesh) -> Any:
    # An array that was restored or made on one device is committed to it, and jit refuses to mix devices.
    if isinstance(x, jax.Array) and x.committed and x.sharding.device_set != set(mesh.devices.flat):
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec()))
    return x


def _describe(mesh: Mesh) -> str:
    shape = " × ".join(f"{name} {size}" for name, size in mesh.shape.items())
    return f"{mesh.devices.flat[0].device_kind} ({shape}), {cpu_threads()} CPU threads"


def _batch_size(batch: Any) -> int:
    sizes = [x.shape[0] for x in jax.tree.leaves(batch) if np.ndim(x)]
    return sizes[0] if sizes else 1


def _shown(metrics: Mapping[str, float]) -> dict[str, float]:
    return {"loss": metrics["loss"]} if "loss" in metrics else {}
