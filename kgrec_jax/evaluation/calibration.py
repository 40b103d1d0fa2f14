"""Scores turned into probabilities: a logistic model of a triple's features, each relation shrunk towards all.

A probability is one of something only under a stated way of drawing true and false examples. Who fits a `Calibrator`
says which; `serving.complete` fits two (is this statement true, is this proposal a missing fact).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from scipy import optimize, special

from kgrec_jax.errors import KgrecError

STRENGTHS = (0.3, 3.0, 30.0, 300.0)  # of the pull of a relation's own weights towards those of all
_RIDGE = 1.0  # on the weights of all, features being standardised
_FOLDS = 5
_NEWTON_STEPS = 50
_MOST = 1e-4  # isotonic probabilities keep this distance from 0 and 1: a step without an exception is no proof


@dataclasses.dataclass(frozen=True)
class Calibrator:
    """P(true | features, relation) = σ(w_r · x + b_r), then an isotonic step function where one was fitted."""

    mean: np.ndarray  # [F] of the features
    scale: np.ndarray  # [F] their standard deviations
    weights: np.ndarray  # [R, F + 1], the last the bias; a relation without examples has those of all
    strength: float  # of the pull towards those of all, chosen by cross-validation
    knots: np.ndarray  # [K] logits of the isotonic steps, ascending; [0] where there are none
    values: np.ndarray  # [K] their probabilities

    def logits(self, features: np.ndarray, relations: np.ndarray) -> np.ndarray:
        """Log-odds [n] of features [n, F] and relations [n] of R."""
        weights = self.weights[relations]
        x = (features - self.mean) / self.scale
        return (x * weights[:, :-1]).sum(axis=1) + weights[:, -1]

    def probabilities(self, features: np.ndarray, relations: np.ndarray, shift: float = 0.0) -> np.ndarray:
        """Probabilities [n]; `shift` is added to the log-odds where true ones are more frequent than in the examples.

        The logarithm of how many times more frequent (King & Zeng, "Logistic regression in rare events data", 2001).
        """
        logits = self.logits(features, relations)
        if len(self.knots):
            logits = special.logit(np.interp(logits, self.knots, self.values))
        return special.expit(logits + shift)

    def to_json(self) -> dict[str, Any]:
        """Numbers and lists."""
        return {name: value.tolist() if isinstance(value, np.ndarray) else value
                for name, value in vars(self).items()}

    @staticmethod
    def from_json(held: dict[str, Any]) -> Calibrator:
        """What `to_json` gave; KeyError, TypeError or ValueError for anything else."""
        fields = {f.name: held[f.name] for f in dataclasses.fields(Calibrator)}
        arrays = {name: np.asarray(value, np.float64) for name, value in fields.items() if name != "strength"}
        return Calibrator(**arrays, strength=float(fields["strength"]))


def fit_calibrator(features: np.ndarray, relations: np.ndarray, labels: np.ndarray, *, num_relations: int,
                   groups: np.ndarray | None = None, method: Literal["logistic", "isotonic"] = "logistic",
                   strengths: Sequence[float] = STRENGTHS) -> Calibrator:
    """The calibrator of examples: features [n, F], relations [n] of R, labels [n] bool.

    A penalised maximum likelihood (Platt 1999 with several features): every relation has weights of its own, with a
    quadratic penalty on their distance from those of all, so that one with three examples says nothing by itself. Its
    strength is that of `strengths` with the best log-likelihood over five folds; examples of one group (a query) are in
    one fold. "isotonic" (Zadrozny & Elkan 2002) then fits a monotone step function to logits of the folds left out;
    it needs many examples. Raises KgrecError where the labels are all of one kind.
    """
    labels = np.asarray(labels, bool)
    if labels.all() or not labels.any():
        kind = "true" if len(labels) and labels.all() else "false" if len(labels) else "no"
        raise KgrecError(f"calibration: found {len(labels):,} examples, {kind} ones alone, expected both true and "
                         "false triples; hold out more (graph.valid_share)")
    mean, scale = features.mean(axis=0), features.std(axis=0)
    scale = np.where(scale > 1e-9, scale, 1.0)
    x = np.concatenate([(features - mean) / scale, np.ones((len(features), 1))], axis=1)
    folds = _folds(np.arange(len(labels)) if groups is None else groups)
    tried = []
    for strength in strengths:
        left_out = np.zeros(len(labels))
        for fold in range(_FOLDS):
            inside = folds != fold
            weights = _fit(x[inside], relations[inside], labels[inside], num_relations, strength)
            left_out[~inside] = (x[~inside] * weights[relations[~inside]]).sum(axis=1)
        tried.append((_log_loss(left_out, labels), strength, left_out))
    _, strength, left_out = min(tried, key=lambda t: t[0])
    knots, values = _steps(left_out, labels) if method == "isotonic" else (np.zeros(0), np.zeros(0))
    weights = _fit(x, relations, labels, num_relations, strength)
    return Calibrator(mean, scale, weights, float(strength), knots, values)


def _folds(groups: np.ndarray) -> np.ndarray:
    """[n] fold of each example, groups dealt out in an order that does not follow their numbers."""
    _, place = np.unique(groups, return_inverse=True)
    order = np.random.default_rng(7).permutation(place.max(initial=-1) + 1)
    return order[place.reshape(-1)] % _FOLDS


def _log_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    return float(np.logaddexp(0.0, np.where(labels, -logits, logits)).mean())


def _fit(x: np.ndarray, relations: np.ndarray, labels: np.ndarray, num_relations: int, strength: float) -> np.ndarray:
    """Weights [R, F + 1]: those of all plus each relation's own deviation, at the minimum of a convex function.

    Newton's method; deviations meet each other only through the weights of all, so a step costs one small system a
    relation (a Schur complement) and none of the size of all of them together.
    """
    width = x.shape[1]
    order = np.argsort(relations, kind="stable")
    present, starts = np.unique(relations[order], return_index=True)
    x, target = x[order], labels[order].astype(np.float64)
    cuts = [slice(a, b) for a, b in zip(starts, np.append(starts[1:], len(order)), strict=True)]
    ridge = np.full(width, _RIDGE)
    ridge[-1] = 1e-3  # the bias of all is free: it is the share of true ones
    shared, own = np.zeros(width), np.zeros((len(present), width))

    def value(shared: np.ndarray, own: np.ndarray) -> tuple[float, np.ndarray]:
        logits = np.concatenate([x[cut] @ (shared + own[k]) for k, cut in enumerate(cuts)])
        penalty = 0.5 * (ridge * shared**2).sum() + 0.5 * strength * (own**2).sum()
        return float((np.logaddexp(0.0, logits) - target * logits).sum() + penalty), logits

    now, logits = value(shared, own)
    for _ in range(_NEWTON_STEPS):
        p = special.expit(logits)
        slope = np.add.reduceat(x * (p - target)[:, None], starts, axis=0)  # [R', F + 1]
        curve = np.stack([(x[cut] * (p * (1 - p))[cut, None]).T @ x[cut] for cut in cuts])
        of_shared, of_own = slope.sum(axis=0) + ridge * shared, slope + strength * own
        solved = np.linalg.solve(curve + strength * np.eye(width), np.concatenate([curve, of_own[..., None]], axis=2))
        inner, toward = solved[..., :-1], solved[..., -1]  # [R', F + 1, F + 1], [R', F + 1]
        schur = (curve - curve @ inner).sum(axis=0) + np.diag(ridge)
        step = -np.linalg.solve(schur, of_shared - np.einsum("rij,rj->i", curve, toward))
        steps = -(toward + inner @ step)
        fall, size = float(of_shared @ step + (of_own * steps).sum()), 1.0
        if fall > -1e-9 * max(now, 1.0):
            break
        while (found := value(shared + size * step, own + size * steps))[0] > now + 1e-4 * size * fall and size > 1e-6:
            size *= 0.5
        shared, own, (now, logits) = shared + size * step, own + size * steps, found
    weights = np.tile(shared, (num_relations, 1))
    weights[present] += own
    return weights


def _steps(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(knots [K], probabilities [K]) of the isotonic fit, one knot in the middle of each step."""
    order = np.argsort(logits, kind="stable")
    fit = optimize.isotonic_regression(labels[order].astype(np.float64))
    blocks = fit.blocks.astype(np.int64)
    knots = np.add.reduceat(logits[order], blocks[:-1]) / np.diff(blocks)
    return knots, np.clip(fit.x[blocks[:-1]], _MOST, 1 - _MOST)
