"""The chain from sampled tokens to the gradient of the logits, written a second time: numpy, fp64, one loop per formula.

Nothing is imported from srpo; formulas are those of the papers. Names: J steps, V tokens, R labelled rows. A response is a list
of token ids; `PIECES` are their texts. Responses open their steps in order and at most once, which keeps `read_steps` simple.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

END = "<end>"
PIECES = (
    *("a:", "a", ":", "\nb:", "\n", "b:", "\nb", "k\nb:", "\nc:", "z.\nc:", "c:", " s", "k"),
    *("=x", "=y", "=", "z", "p", "q", "=p", "=q", " ", "=w", END),
)
ID = {piece: i for i, piece in enumerate(PIECES)}
OPTIONS = ((), ("x", "y", "z"), ("p", "q"))
NAMES = ("a", "b", "c")
Array = np.ndarray


@dataclass
class Response:
    """A sampled response and, as they become known, its parts."""

    group: int
    ids: list[int]
    finish: str
    gold: tuple[str | None, ...]  # of its pair
    verdicts: tuple[Any, ...]  # of the judge
    sampling: Array = field(default_factory=lambda: np.zeros(0))  # [L] log-probabilities of the engine
    ends: list[int] = field(default_factory=list)  # [J]
    answers: list[str | None] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)

    @property
    def lengths(self) -> list[int]:
        return [b - a for a, b in zip([0, *self.ends[:-1]], self.ends, strict=True)]


# ---- tokens to rewards: the parser's rules and Eq. 5 ---------------------------------------------------------------------------


def read_steps(r: Response) -> None:
    """Step ends and answers. A token lies in the step of its first character; a step starts with its header's line."""
    ids = r.ids[:-1] if r.ids and PIECES[r.ids[-1]] == END else r.ids
    text, starts = "", []
    for i in ids:
        starts.append(len(text))
        text += PIECES[i]
    heads: list[int | None] = []
    for name in NAMES:
        at = 0 if text.startswith(f"{name}:") else text.find(f"\n{name}:") + 1
        heads.append(at if at or text.startswith(f"{name}:") else None)
    for j, head in enumerate(heads):
        end = next((h for h in heads[j + 1 :] if h is not None), len(text))
        r.ends.append(len(r.ids) if end == len(text) else sum(start < end for start in starts))
        if head is None:
            r.answers.append(None)
            continue
        body = text[head + 2 : end]
        if not OPTIONS[j]:
            r.answers.append(" ".join(body.split()) or None)
        else:
            marked = [body[i + 1] for i in range(len(body) - 1) if body[i] == "=" and body[i + 1] in OPTIONS[j]]
            r.answers.append(marked[-1] if marked else None)


def earn(r: Response, sources: Sequence[Sequence[str]], maxima: Sequence[float], missing: Sequence[float]) -> None:
    """Eq. 5: the first source that can grade a step does."""
    for j, (answer, gold, verdict) in enumerate(zip(r.answers, r.gold, r.verdicts, strict=True)):
        names, most = sources[j], maxima[j]
        able = [s for s in names if not (s == "gold" and gold is None)]
        if answer is None and able[0] != "skip":
            r.rewards.append(0.0)
            r.sources.append("missing")
            continue
        for source in able:
            if source == "judge" and verdict is None:
                continue
            share = {"gold": answer == gold, "judge": verdict, "rule": answer is not None, "skip": 0.0}[source]
            r.rewards.append(most * float(share or 0.0))
            r.sources.append(source)
            break
        else:
            r.rewards.append(missing[j] * most)
            r.sources.append("no_verdict")


# ---- rewards to advantages and weights: 4.2.1, Algorithm 1, Eq. 4 --------------------------------------------------------------


def scores_of(rs: Sequence[Response], maxima: Sequence[float], final: bool) -> dict[int, float]:
    out: dict[int, list[float]] = {}
    for r in rs:
        steps = range(len(maxima) - 1, len(maxima)) if final else range(len(maxima))
        most = sum(maxima[j] for j in steps if r.sources[j] != "skip")
        out.setdefault(r.group, []).append(sum(r.rewards[j] for j in steps) / most if most else 0.0)
    return {g: sum(v) / len(v) for g, v in out.items()}


def scalar_of(r: Response, method: str) -> float:
    if method == "grpo":
        return r.rewards[-1]
    if method == "grpo_star":
        return r.rewards[-1] + sum(x for x, s in zip(r.rewards[:-1], r.sources[:-1], strict=True) if s in ("gold", "rule"))
    return sum(r.rewards)


def standard(values: Sequence[float], delta: float, divide: bool) -> list[float]:
    """(x - mean) / (sample std + delta); 0 if all are equal."""
    x = np.array(values, dtype=np.float64)
    std = math.sqrt(((x - x.mean()) ** 2).sum() / max(len(x) - 1, 1))
    return [0.0] * len(x) if std <= 1e-8 else list((x - x.mean()) / (std + delta if divide else 1.0))


def unclipped_advantages(rs: Sequence[Response], method: str, normalize: str, gamma: float, divide: bool) -> Array:
    """[N, J] before the clip; rs are the responses of all groups that train."""
    num_steps = len(NAMES)
    out = np.zeros((len(rs), num_steps))
    members = {g: [i for i, r in enumerate(rs) if r.group == g] for g in {r.group for r in rs}}
    if method == "srpo":
        returns = np.array(
            [[sum(gamma ** (k - j) * r.rewards[k] for k in range(j, num_steps)) for j in range(num_steps)] for r in rs]
        )
        if normalize == "none":
            return returns
        if normalize == "batch":
            where = [(i, j) for i, r in enumerate(rs) for j, n in enumerate(r.lengths) for _ in range(n)]
            values = [returns[i, j] for i, j in where]
            x, total = np.array(values), len(values)
            mean, std = x.mean(), math.sqrt(((x - x.mean()) ** 2).sum() / max(total - 1, 1))
            return np.zeros_like(returns) if std <= 1e-8 else (returns - mean) / (std + 1e-8 if divide else 1.0)
        for rows in members.values():
            columns = [[(i, j) for i in rows] for j in range(num_steps)]
            for cells in columns if normalize == "group_step" else [[cell for column in columns for cell in column]]:
                for (i, j), value in zip(cells, standard([returns[c] for c in cells], 1e-6, divide), strict=True):
                    out[i, j] = value
        return out
    scalars = [scalar_of(r, method) for r in rs]
    if method == "reinforce":
        tokens = [s for s, r in zip(scalars, rs, strict=True) for _ in r.ids]
        x = np.array(tokens)
        std = math.sqrt(((x - x.mean()) ** 2).sum() / max(len(x) - 1, 1))
        return out if std <= 1e-8 else out + ((np.array(scalars) - x.mean()) / (std + 1e-8 if divide else 1.0))[:, None]
    for rows in members.values():
        for i in rows:
            if method == "rloo":
                out[i] = scalars[i] - np.mean([scalars[k] for k in rows if k != i])
        if method != "rloo":
            out[rows] = np.array(standard([scalars[i] for i in rows], 1e-6, divide))[:, None]
    return out


def weights_of(rs: Sequence[Response], masked: Sequence[bool], denominator: str, longest: int) -> Array:
    """[N] weight of each token of a response, with the denominators of Eq. 6."""
    sizes = {r.group: sum(x.group == r.group for x in rs) for r in rs}
    total = sum(len(r.ids) for r, cut in zip(rs, masked, strict=True) if not cut)
    out = []
    for r, cut in zip(rs, masked, strict=True):
        mean = 1 / (len(sizes) * sizes[r.group])
        by = {"sequence_mean": mean / len(r.ids), "token_mean": 1 / max(total, 1), "constant": mean / longest}
        out.append(0.0 if cut else by[denominator])
    return np.array(out)


def gae_advantages(
    rs: Sequence[Response], values: Array, placement: str, gamma: float, lam: float, clip: float, divide: bool
) -> Array:
    """[R] advantages of PPO before the clip, by the recursion of Schulman et al. 2016; values [R] of all tokens."""
    out, start = [], 0
    for r in rs:
        length = len(r.ids)
        rewards, v = np.zeros(length), [*values[start : start + length], 0.0]
        for end, reward in zip(r.ends, r.rewards, strict=True):
            rewards[max(end - 1, 0) if placement == "step_ends" else length - 1] += reward
        ahead, row = 0.0, [0.0] * length
        for t in reversed(range(length)):
            ahead = rewards[t] + gamma * v[t + 1] - v[t] + gamma * lam * ahead
            row[t] = ahead
        out += row
        start += length
    x = np.array(out)
    std = math.sqrt(((x - x.mean()) ** 2).sum() / max(len(x) - 1, 1))
    return np.zeros_like(x) if std <= 1e-8 else (x - x.mean()) / (std + 1e-8 if divide else 1.0)


# ---- advantages to the gradient: Eq. 6 -----------------------------------------------------------------------------------------


def top(logits: Array, k: int | None) -> list[list[int]]:
    """Ids of the k largest logits of each row; of all without k."""
    return [sorted(np.argsort(-row)[: k or len(row)].tolist()) for row in logits]


def distribution(
    logits: Array, labels: Sequence[int], support: Sequence[Sequence[int]], temperature: float
) -> list[dict[int, float]]:
    """{id: log-probability} of each row over its support; the label belongs to it."""
    out = []
    for row, label, ids in zip(logits, labels, support, strict=True):
        ids = sorted({label, *ids})
        x = row[ids] / temperature
        lse = x.max() + math.log(np.exp(x - x.max()).sum())
        out.append(dict(zip(ids, x - lse, strict=True)))
    return out


def of_labels(dist: Sequence[dict[int, float]], labels: Sequence[int]) -> Array:
    return np.array([d[label] for d, label in zip(dist, labels, strict=True)])


@dataclass
class Loss:
    """Loss, its gradient by the logits, and the sums that metrics are made of, one entry per row."""

    loss: float
    grad: Array  # [R, V]
    rows: dict[str, Array]  # entropy, kl, clip_frac, ratio: [R] each


def policy_loss(
    logits: Array,
    labels: Sequence[int],
    support: Sequence[Sequence[int]],
    advantages: Array,
    weights: Array,
    old: Array,
    segments: Sequence[int],
    ref: Array | None,
    cfg: Any,
    temperature: float,
) -> Loss:
    """Eq. 6 over R rows. segments [R]: rows of a segment share a ratio. ref [R, V]: reference logits. cfg: loss settings."""
    dist = distribution(logits, labels, support, temperature)
    logp = of_labels(dist, labels)
    q = None if ref is None else distribution(ref, labels, support, temperature)
    gap = logp - old
    sums: dict[int, list[float]] = {}
    for s, g in zip(segments, gap, strict=True):
        sums.setdefault(s, []).append(g)
    ratio = np.exp([sum(sums[s]) / len(sums[s]) for s in segments])
    low, high = 1 - cfg.clip_eps_low, 1 + cfg.clip_eps_high
    grad, loss = np.zeros_like(logits), 0.0
    rows = {key: np.zeros(len(labels)) for key in ("entropy", "kl", "clip_frac", "ratio")}
    for t, (d, a, rho, w) in enumerate(zip(dist, advantages, ratio, weights, strict=True)):
        if cfg.clip_form == "cispo":
            bounded = min(max(rho, low), high)
            term, slope = -bounded * a * logp[t], -bounded * a
        else:
            surrogate = min(rho * a, min(max(rho, low), high) * a)
            if cfg.dual_clip and a < 0:
                surrogate = max(surrogate, cfg.dual_clip * a)
            bounded = surrogate / a if a else rho
            live = abs(surrogate - rho * a) <= 1e-12 * abs(rho * a)
            term, slope = -surrogate, -rho * a if live else 0.0
        direct: dict[int, float] = {}
        if q is not None:
            x = logp[t] - q[t][labels[t]]
            if cfg.kl_estimator == "full":
                kl = sum(math.exp(lp) * (lp - q[t][i]) for i, lp in d.items())
                direct = {i: math.exp(lp) * (lp - q[t][i] - kl) for i, lp in d.items()}
                kl_slope = 0.0
            else:
                kl = {"k1": x, "k2": x * x / 2, "k3": math.exp(-x) - 1 + x}[cfg.kl_estimator]
                kl_slope = {"k1": 1.0, "k2": x, "k3": 1 - math.exp(-x)}[cfg.kl_estimator]
            term, slope = term + cfg.kl_coef * kl, slope + cfg.kl_coef * kl_slope
            rows["kl"][t] = kl
        loss += w * term
        for i, lp in d.items():
            by_logit = slope * ((i == labels[t]) - math.exp(lp)) + cfg.kl_coef * direct.get(i, 0.0)
            grad[t, i] += w * by_logit / temperature
        rows["entropy"][t] = -sum(math.exp(lp) * lp for lp in d.values())
        rows["ratio"][t] = rho
        rows["clip_frac"][t] = bool(a) and abs(bounded - rho) > 1e-12
    return Loss(loss, grad, rows)


def importance(gap: Array, kind: str, cap: float) -> Array:
    """Factor of each token's weight; gap: log-probability of the trainer minus the engine's."""
    ratio = np.exp(gap)
    factor: dict[str, Callable[[], Array]] = {
        "off": lambda: np.ones_like(ratio),
        "truncate": lambda: np.minimum(ratio, cap),
        "mask": lambda: ((ratio >= 1 / cap) & (ratio <= cap)).astype(float),
    }
    return factor[kind]()
