"""The whole chain, from sampled tokens to the gradient, against `chain_oracle` (numpy, fp64), with settings drawn over all of it.

A case draws a configuration (sources, method, normalization, window, loss, sampler, updates, micro-batches) and ragged responses
with missing steps, tokens that straddle two steps, cut and empty ones; then two optimizer steps' worth of updates are compared.
"""

from __future__ import annotations

import random
import zlib
from pathlib import Path
from typing import Any

import chain_oracle as oracle
import hypothesis
import numpy as np
import pytest
import small_world as small
import torch
from chain_oracle import ID, NAMES, PIECES, Response
from torch import nn

from srpo.core.batch import IGNORE, Batch, pack
from srpo.core.config.train import Config
from srpo.core.grades import Grades
from srpo.core.step_presets import StepsConfig
from srpo.core.steps import StepSpec
from srpo.data.examples import Example
from srpo.policy.parallel import Parallel
from srpo.rewards.hybrid import score
from srpo.rollout.engine import Sample
from srpo.rollout.rollouts import to_rollouts
from srpo.training.checks import check_settings
from srpo.training.credit import assign_credit, rollout_metrics
from srpo.training.ppo import with_token_advantages
from srpo.training.update import Objective, update, with_logprobs

V, LONGEST = len(PIECES), 24
ONE = Parallel(0, 1, 0, torch.device("cpu"))


class Pieces:
    """A tokenizer of `PIECES`."""

    all_special_ids = (ID[oracle.END],)

    def decode(self, ids: Any) -> str:
        return "".join(PIECES[i] for i in ids)


class Table(nn.Module):
    """A model whose hidden states are parameters, one row per labelled row of all micro-batches in order."""

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor) -> None:
        super().__init__()
        self.hidden, self.weight, self._next = nn.Parameter(hidden), nn.Parameter(weight), 0

    def forward(self, batch: Batch, through: Any = None) -> Any:
        first = self._next
        self._next = (first + int((batch.labels != IGNORE).sum())) % len(self.hidden)
        hidden = self.hidden[first : self._next or len(self.hidden)]
        return through(hidden, self.weight) if through else hidden @ self.weight.T

    def logits(self) -> np.ndarray:
        return (self.hidden.detach().double() @ self.weight.detach().double().T).numpy()


class Values(nn.Module):
    """A critic of fixed values, in the order of the labelled rows."""

    def __init__(self, values: np.ndarray) -> None:
        super().__init__()
        self._values, self._next = torch.from_numpy(values).float(), 0

    def forward(self, batch: Batch) -> torch.Tensor:
        first = self._next
        self._next += int((batch.labels != IGNORE).sum())
        return self._values[first : self._next]


class Gradients(torch.optim.Optimizer):
    """Keeps the gradients of its last step, which moves no parameter by more than 0.1."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})
        self.last: list[np.ndarray] = []

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.last = []
        for parameter in self.param_groups[0]["params"]:
            self.last.append(parameter.grad.double().numpy().copy())
            parameter -= parameter.grad * (0.1 / parameter.grad.abs().max().clamp(min=1e-12))


def draw_settings(rng: random.Random) -> Config:
    """A configuration that `check_settings` accepts, drawn over every setting between the tokens and the gradient."""
    one = rng.choice
    method = one(("srpo", "srpo", "srpo", "grpo", "grpo_star", "grpo_step_sum", "reinforce", "rloo", "ppo"))
    top_k = one((0, 0, 3, 8, V + 5))
    form = one(("ppo", "ppo", "cispo"))
    of_b = one((("gold", "judge"), ("gold", "rule"), ("gold", "skip"), ("judge", "rule")))
    steps = (
        StepSpec("a", "^a:", sources=one((("judge",), ("judge", "skip"), ("skip",))), reward=one((0.2, 0.7)),
                 missing_verdict=one((None, 0.5))),
        StepSpec("b", "^b:", r"=(\w)", ("x", "y", "z"), of_b, 0.2),
        StepSpec("c", "^c:", r"=(\w)", ("p", "q"), ("gold",), 1.0),
    )  # fmt: skip
    changes: dict[str, Any] = {
        "data": {"train": "x"},
        "rollout": {
            "num_prompts": rng.randint(1, 4), "group_size": rng.randint(2, 5), "max_new_tokens": LONGEST, "top_k": top_k,
            "temperature": one((0.5, 0.99, 1.0, 1.7)), "ratio": one(("filtered", "unfiltered")),
        },
        "reward": {"missing_verdict": one((0.0, 0.25))},
        "advantage": {
            "method": method, "gamma": one((0.0, 0.5, 0.9, 1.0)), "normalize": one(("batch", "group", "group_step", "none")),
            "scale": one(("std", "none")), "clip": one((0.0, 0.3, 0.7, 1.4, 2.0)),
        },
        "sampler": {
            "difficulty_low": one((-1.0, -1.0, 0.01, 0.2)), "difficulty_high": one((0.9, 2.0, 2.0)),
            "difficulty_score": one(("total", "final")), "refill": one((0, 0, 1)),
        },
        "loss": {
            "clip_eps_low": one((0.0, 0.1, 0.2)), "clip_eps_high": one((0.1, 0.2, 0.4)), "kl_coef": one((0.0, 0.001, 0.3)),
            "kl_estimator": one(("k1", "k2", "k3", "full")), "denominator": one(("sequence_mean", "token_mean", "constant")),
            "ratio_over": "token" if method == "ppo" else one(("token", "token", "step", "sequence")), "clip_form": form,
            "dual_clip": one((0.0, 1.5)) if form == "ppo" else 0.0, "importance": one(("off", "truncate", "mask")),
            "importance_cap": one((1.0, 1.1, 2.0)), "overlong": one(("train", "mask")), "num_updates": one((1, 2)),
            "inputs": one(("logits", "hidden")), "impl": one(("auto", "reference")),
        },
        "critic": {"rewards": one(("step_ends", "end")), "gamma": one((0.9, 1.0)), "gae_lambda": one((0.0, 0.8, 1.0))},
        "train": {"micro_batch_tokens": one((40, 80, 10_000))},
    }  # fmt: skip
    if changes["rollout"]["ratio"] == "filtered" and 0 < top_k < V:
        changes["rollout"]["support"] = one(("recompute", "replay"))
    cfg = small.changed(Config(steps=StepsConfig.of(steps), grades=Grades(steps[-1].options)), changes)
    check_settings(cfg)
    return cfg


def draw_ids(rng: random.Random) -> tuple[list[int], str]:
    """(tokens, finish) of a response that opens some of its steps, in order, with headers that are cut into tokens anyhow."""
    body = (" s", "k", "=x", "=y", "=", "z", "p", "q", "=p", "=q", " ", "=w")
    openings = (
        (("a:",), ("a", ":")),
        (("\nb:",), ("\n", "b:"), ("\nb", ":"), ("k\nb:",)),
        (("\nc:",), ("\n", "c:"), ("z.\nc:",)),
    )
    pieces: list[str] = []
    for j, ways in enumerate(openings):
        if rng.random() < 0.8 and (j or not pieces):
            pieces += rng.choice(ways)
            pieces += rng.choices(body, k=rng.randint(0, 4))
        elif not j:
            pieces += rng.choices(body, k=rng.randint(0, 2))
    ids, cut = [ID[p] for p in pieces], rng.random() < 0.3
    return (ids or [ID["k"]], "length") if cut else ([*ids, ID[oracle.END]], "stop")


class Judge:
    """Verdicts that are a hash of the response: right, wrong, none, or a share."""

    def judge(self, rollouts: Any, examples: Any) -> list[tuple[Any, ...]]:
        return [verdicts_on(e.example_id, r.text) for r, e in zip(rollouts, examples, strict=True)]


def verdicts_on(example_id: str, text: str) -> tuple[Any, ...]:
    choices = (True, False, None, 0.25)
    return tuple(choices[zlib.crc32(f"{example_id} {text} {j}".encode()) % 4] for j in range(len(NAMES)))


def close(ours: Any, right: Any, what: str, tolerance: float = 2e-6, least: float = 1e-6) -> None:
    """|ours - right| <= tolerance x the largest |right|, at least `least`."""
    ours, right = np.asarray(ours, dtype=np.float64), np.asarray(right, dtype=np.float64)
    assert ours.shape == right.shape, what
    bound = tolerance * max(float(np.abs(right).max(initial=0.0)), least / tolerance * 0.1)
    worst = float(np.abs(ours - right).max(initial=0.0))
    assert worst <= bound, f"{what}: off by {worst:.3g}, bound {bound:.3g}"


def check_clip_frac(got: float, raw: np.ndarray, clip: float) -> None:
    """The fraction of advantages beyond the clip; those on its edge, but for rounding, may count or not."""
    most, least = ((np.abs(raw) > clip * edge).mean() for edge in (1 - 1e-6, 1 + 1e-6))
    assert least - 1e-9 <= got <= most + 1e-9, f"advantage/clip_frac {got}, not from {least} to {most}"


def check_chain(seed: int, dump: Path) -> int:
    """Draw a case, compare everything; return the number of updates compared."""
    rng, gen = random.Random(seed), np.random.default_rng(seed)
    cfg = draw_settings(rng)
    schema, method = cfg.schema, cfg.advantage.method
    sources, maxima = [s.sources for s in schema.specs], [s.reward for s in schema.specs]
    golds = [
        (None, rng.choice(("x", "y", "z", None)) if sources[1][0] == "gold" else None, rng.choice(("p", "q")))
        for _ in range(cfg.rollout.num_prompts)
    ]
    examples = [Example(f"e{i}", f"q{i}", "q", "t", {}, gold, (None,) * 3, {}) for i, gold in enumerate(golds)]
    right: list[Response] = []
    for group, gold in enumerate(golds):
        for _ in range(cfg.rollout.group_size):
            ids, finish = draw_ids(rng)
            text = "".join(PIECES[i] for i in ids if PIECES[i] != oracle.END)
            right.append(Response(group, ids, finish, gold, verdicts_on(f"e{group}", text)))

    # Tokens to rewards.
    supports = [np.stack([gen.permutation(V)[:3] for _ in r.ids]).astype(np.int32) for r in right]
    for r, ids in zip(right, supports, strict=True):
        ids[:, -1] = np.where(gen.random(len(ids)) < 0.3, -1, ids[:, -1])
        r.sampling = gen.normal(-2, 0.5, len(r.ids)).astype(np.float32).astype(np.float64)
    replay = cfg.rollout.support == "replay"
    samples = [
        Sample(r.group, tuple(r.ids), tuple(r.sampling), r.finish, support=s if replay else None)
        for r, s in zip(right, supports, strict=True)
    ]
    prompts = [tuple(rng.choices(range(V), k=rng.randint(1, 5))) for _ in golds]
    rollouts = to_rollouts(examples, samples, prompts, schema, Pieces(), 0)
    rollouts = score(rollouts, [examples[r.group] for r in rollouts], schema, Judge(), cfg.reward.missing_verdict)
    for r, ours in zip(right, rollouts, strict=True):
        oracle.read_steps(r)
        missing = [cfg.reward.missing_verdict if s.missing_verdict is None else s.missing_verdict for s in schema.specs]
        oracle.earn(r, sources, maxima, missing)
        assert (list(ours.step_ends), list(ours.answers)) == (r.ends, r.answers), r
        assert (list(ours.step_rewards or ()), list(ours.reward_sources or ())) == (pytest.approx(r.rewards), r.sources), r

    # Rewards to advantages and weights.
    credit = assign_credit(rollouts, schema, cfg.advantage, cfg.loss, cfg.sampler, LONGEST)
    scores = oracle.scores_of(right, maxima, cfg.sampler.difficulty_score == "final")
    assert credit.group_scores == pytest.approx(scores, abs=1e-12)
    inside = {g for g, s in scores.items() if cfg.sampler.difficulty_low < s < cfg.sampler.difficulty_high}
    if cfg.sampler.refill:
        by_step = method in ("srpo", "ppo")
        seen = {g: {tuple(r.rewards) if by_step else oracle.scalar_of(r, method) for r in right if r.group == g} for g in inside}
        inside = {g for g in inside if len(seen[g]) > 1}
    chosen = [i for i, r in enumerate(right) if r.group in inside]
    masked = [cfg.loss.overlong == "mask" and right[i].finish == "length" for i in chosen]
    trains = [i for i, cut in zip(chosen, masked, strict=True) if not cut]
    assert credit.trains.nonzero()[0].tolist() == trains
    if not trains:
        return 0
    rows = [right[i] for i in chosen]
    weights = oracle.weights_of(rows, masked, cfg.loss.denominator, LONGEST)
    close(credit.weights[chosen], weights, "weights", 1e-6)
    clip, divide, keep = cfg.advantage.clip, cfg.advantage.scale == "std", [i for i, cut in enumerate(masked) if not cut]
    of_rows = [right[i] for i in trains]
    labels = [i for r in of_rows for i in r.ids]
    steps = [j for r in of_rows for j, n in enumerate(r.lengths) for _ in range(n)]
    owners = [i for i, r in enumerate(of_rows) for _ in r.ids]
    if method != "ppo":
        divides = divide or method == "rloo"
        exact = oracle.unclipped_advantages(rows, method, cfg.advantage.normalize, cfg.advantage.gamma, divides)[keep]
        raw = np.array([exact[i, j] for i, j in zip(owners, steps, strict=True)])
        bounded = np.clip(exact, -clip, clip) if clip else exact
        close(credit.advantages[trains], bounded, "advantages")
        # The sign of an advantage decides what is clipped, and that of a zero is chance: as the trainer has it.
        own = np.array([float(credit.advantages[trains][i, j]) for i, j in zip(owners, steps, strict=True)])
        raw = np.where(np.abs(raw) < 1e-9, own, raw)
        metrics = rollout_metrics(rollouts, schema, credit)
        close(
            metrics["advantage/abs_mean"],
            np.abs(np.array([bounded[i, j] for i, j in zip(owners, steps, strict=True)])).mean(),
            "abs_mean",
        )
        if clip:
            check_clip_frac(metrics["advantage/clip_frac"], raw, clip)
        close(metrics["reward/total"], np.mean([sum(r.rewards) for r in right]), "reward/total")

    # Advantages to the gradient.
    def table() -> Table:
        hidden, weight = gen.normal(0, 1, (len(labels), 6)), gen.normal(0, 0.4, (V, 6))
        return Table(torch.from_numpy(hidden).float(), torch.from_numpy(weight).float())

    policy, reference = table(), table() if cfg.loss.kl_coef else None
    batches = pack([rollouts[i] for i in trains], credit.advantages[trains], credit.weights[trains], cfg.train.micro_batch_tokens)
    objective = Objective.from_config(cfg.loss, cfg.rollout)
    batches = with_logprobs(batches, policy, reference, objective, ONE)
    if method == "ppo":
        values = gen.normal(0, 1, len(labels)).astype(np.float32).astype(np.float64)
        critic = {"rewards": cfg.critic.rewards, "gamma": cfg.critic.gamma, "gae_lambda": cfg.critic.gae_lambda}
        batches, metrics = with_token_advantages(batches, Values(values), ONE, scale=cfg.advantage.scale, clip=clip, **critic)  # pyright: ignore[reportArgumentType]
        raw = oracle.gae_advantages(of_rows, values, cfg.critic.rewards, cfg.critic.gamma, cfg.critic.gae_lambda, clip, divide)
        if clip:
            check_clip_frac(metrics["advantage/clip_frac"], raw, clip)
    advantages = np.clip(raw, -clip, clip) if clip else raw
    token_weights = np.array([weights[keep][i] for i in owners])
    sampling = np.concatenate([r.sampling for r in of_rows])
    temperature, top_k = cfg.rollout.temperature, cfg.rollout.top_k or None
    logits = policy.logits()
    if replay:
        support = [[i for i in row if i >= 0] for index in trains for row in supports[index].tolist()]
    else:
        support = oracle.top(logits, top_k if cfg.rollout.ratio == "filtered" else None)
    over = {
        "token": list(range(len(labels))),
        "step": [i * 3 + j for i, j in zip(owners, steps, strict=True)],
        "sequence": owners,
    }
    segments = over[cfg.loss.ratio_over]
    old = oracle.of_labels(oracle.distribution(logits, labels, support, temperature), labels)
    sampled = support if cfg.rollout.ratio == "filtered" else oracle.top(logits, top_k)
    gap = oracle.of_labels(oracle.distribution(logits, labels, sampled, temperature), labels) - sampling
    token_weights = token_weights * oracle.importance(gap, cfg.loss.importance, cfg.loss.importance_cap)

    optimizer = Gradients(policy.parameters())
    for number in range(cfg.loss.num_updates):
        logits, hidden, weight = policy.logits(), policy.hidden.detach().double().numpy(), policy.weight.detach().double().numpy()
        if cfg.loss.num_updates == 1 and not replay and cfg.rollout.ratio == "filtered":
            support = oracle.top(logits, top_k)
        ref = None if reference is None else reference.logits()
        expected = oracle.policy_loss(
            logits, labels, support, advantages, token_weights, old, segments, ref, cfg.loss, temperature
        )
        metrics = update(
            policy, optimizer, batches, objective, ONE, step_names=NAMES, grad_clip=0.0, dump=dump, reference=reference
        )
        scale = float(np.abs(token_weights).sum()) * max(1.0, float(np.abs(advantages).max()))
        assert metrics["train/loss"] == pytest.approx(expected.loss, rel=2e-6, abs=3e-5 * max(scale, 1e-3))
        close(optimizer.last[0], expected.grad @ weight, "gradient of the hidden states", 1e-5)
        close(optimizer.last[1], expected.grad.T @ hidden, "gradient of the head", 1e-5)
        norm = float(np.sqrt(((expected.grad @ weight) ** 2).sum() + ((expected.grad.T @ hidden) ** 2).sum()))
        assert metrics["train/grad_norm"] == pytest.approx(norm, rel=2e-5, abs=1e-7)
        for key, values_of_rows in expected.rows.items():
            if key == "kl" and reference is None:
                assert not [name for name in metrics if name.startswith("policy/kl")]
                continue
            assert metrics[f"policy/{key}"] == pytest.approx(values_of_rows.mean(), rel=1e-4, abs=2e-6), key
            for j, name in enumerate(NAMES):
                of_step = values_of_rows[np.array(steps) == j]
                assert (f"policy/{key}/{name}" in metrics) == (len(of_step) > 0)
                if len(of_step):
                    assert metrics[f"policy/{key}/{name}"] == pytest.approx(of_step.mean(), rel=1e-4, abs=2e-6), f"{key}/{name}"
        assert metrics["train/num_tokens"] == len(labels)
        if number == 0:
            assert metrics["rollout/mismatch_kl"] == pytest.approx((np.exp(gap) - 1 - gap).mean(), rel=1e-4)
            assert metrics["rollout/mismatch_max"] == pytest.approx(np.abs(gap).max(), rel=1e-4)
    return cfg.loss.num_updates


@pytest.mark.parametrize("part", range(4))
def test_tokens_to_gradient_equal_the_oracle(part: int, tmp_path: Path) -> None:
    compared, start, cases = 0, random.randrange(2**31), hypothesis.settings().max_examples // 2
    for seed in range(start, start + cases):
        try:
            compared += check_chain(seed, tmp_path / "dump.pt")
        except AssertionError as error:
            raise AssertionError(f"case {seed}: {error}") from error
    assert compared > cases // 2
