"""Each variant of the loss, from settings and rollouts to the gradient, against its paper's formula in plain torch, fp64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from variant_cases import (
    MAX_NEW,
    Drawn,
    Terms,
    clipped,
    draw,
    mean_of_means,
    of_groups,
    packed,
    ratios,
    settings,
    spans,
    stepped,
    totals,
    verdicts,
)

from srpo.core.config.train import Config
from srpo.core.settings import apply_toml

BASELINES = Path(__file__).resolve().parents[2] / "configs" / "baselines"


def grpo(drawn: Drawn, logprobs: Terms) -> torch.Tensor:
    advantages = of_groups(drawn, verdicts(drawn))
    return mean_of_means([clipped(r, a, 0.2, 0.2) for r, a in zip(ratios(drawn, logprobs), advantages, strict=True)])


def grpo_star(drawn: Drawn, logprobs: Terms) -> torch.Tensor:
    """5.1.4: the reward counts the steps verified by a label, and the verdict."""
    rewards = []
    for r in drawn.rollouts:
        steps = zip(r.step_rewards or (), r.reward_sources or (), strict=True)
        rewards.append(sum(x for j, (x, source) in enumerate(steps) if j == 4 or source == "gold"))
    advantages = of_groups(drawn, rewards)
    return mean_of_means([clipped(r, a, 0.2, 0.2) for r, a in zip(ratios(drawn, logprobs), advantages, strict=True)])


def dr_grpo(drawn: Drawn, logprobs: Terms) -> torch.Tensor:
    """Liu et al., arXiv 2503.20783: neither std nor 1/|o|; the sum over tokens is divided by a constant."""
    advantages = of_groups(drawn, verdicts(drawn), divide=False)
    terms = [clipped(r, a, 0.2, 0.2).sum() for r, a in zip(ratios(drawn, logprobs), advantages, strict=True)]
    return torch.stack(terms).sum() / (len(terms) * MAX_NEW)


def dapo(drawn: Drawn, logprobs: Terms) -> torch.Tensor:
    """Yu et al., arXiv 2503.14476: clip higher, mean over all tokens of the responses that were not cut."""
    advantages = of_groups(drawn, totals(drawn))
    finished = [r.finish == "stop" for r in drawn.rollouts]
    terms = [clipped(r, a, 0.2, 0.28) for r, a in zip(ratios(drawn, logprobs), advantages, strict=True)]
    return torch.cat([t for t, keep in zip(terms, finished, strict=True) if keep]).mean()


def gspo(drawn: Drawn, logprobs: Terms) -> torch.Tensor:
    """Zheng et al., arXiv 2507.18071, Eq. 5-7: one ratio for each sequence, (pi / pi_old)^(1/|o|), clipped as such."""
    advantages = of_groups(drawn, verdicts(drawn))
    terms = []
    for new, old, advantage in zip(logprobs, drawn.old, advantages, strict=True):
        terms.append(clipped((new - old).mean().exp(), advantage, 0.05, 0.06))
    return torch.stack(terms).mean()


def per_group_and_step(drawn: Drawn) -> list[list[torch.Tensor]]:
    """Returns of Algorithm 1, standardised within group and step."""
    returns = [[sum((r.step_rewards or ())[j:]) for j in range(5)] for r in drawn.rollouts]
    columns = [of_groups(drawn, [x[j] for x in returns]) for j in range(5)]
    return [[columns[j][i] for j in range(5)] for i in range(len(returns))]


def srpo_step_ratio(drawn: Drawn, logprobs: Terms) -> torch.Tensor:
    """GSPO's ratio, one for each reasoning step, with advantages by step: 1/|o| sum over steps |S_j| min(...)."""
    total = []
    for rollout, new, old, advantages in zip(drawn.rollouts, logprobs, drawn.old, per_group_and_step(drawn), strict=True):
        value = new.new_zeros(())
        for span, advantage in zip(spans(rollout), advantages, strict=True):
            if span.start < span.stop:
                ratio = (new[span] - old[span]).mean().exp()
                value = value + (span.stop - span.start) * clipped(ratio, advantage, 0.05, 0.06)
        total.append(value / len(new))
    return torch.stack(total).mean()


def srpo(drawn: Drawn, logprobs: Terms) -> torch.Tensor:
    """Eq. 6 with a baseline for each step of each group."""
    terms = []
    for rollout, ratio, advantages in zip(drawn.rollouts, ratios(drawn, logprobs), per_group_and_step(drawn), strict=True):
        terms.append(torch.cat([clipped(ratio[s], a, 0.2, 0.2) for s, a in zip(spans(rollout), advantages, strict=True)]))
    return mean_of_means(terms)


def cispo(drawn: Drawn, logprobs: Terms) -> torch.Tensor:
    """MiniMax-M1, arXiv 2506.13585, Eq. 4-5: sg(clip(ratio)) A log pi, mean over all tokens."""
    advantages = of_groups(drawn, verdicts(drawn))
    each = zip(ratios(drawn, logprobs), advantages, logprobs, strict=True)
    return torch.cat([-r.detach().clamp(0.0, 1.3) * a * new for r, a, new in each]).mean()


def dual_clip(drawn: Drawn, logprobs: Terms) -> torch.Tensor:
    """Ye et al., arXiv 1912.09729, Eq. 5: max(min(r A, clip(r) A), c A) where A < 0."""
    terms = []
    for ratio, advantage in zip(ratios(drawn, logprobs), of_groups(drawn, verdicts(drawn)), strict=True):
        surrogate = -clipped(ratio, advantage, 0.2, 0.2)
        terms.append(-(torch.max(surrogate, 1.5 * advantage) if advantage < 0 else surrogate))
    return mean_of_means(terms)


def reinforce(drawn: Drawn, logprobs: Terms) -> torch.Tensor:
    """-(R - mean) / std log pi, mean and std over tokens; the first update, where the ratio is 1."""
    tokens = torch.tensor([x for r, x in zip(drawn.rollouts, totals(drawn), strict=True) for _ in r.response_ids]).double()
    advantages = [(x - tokens.mean()) / (tokens.std() + 1e-8) for x in totals(drawn)]
    return mean_of_means([-a * (new - new.detach()).exp() for a, new in zip(advantages, logprobs, strict=True)])


def rloo(drawn: Drawn, logprobs: Terms) -> torch.Tensor:
    terms, rewards = [], totals(drawn)
    for i, (rollout, new) in enumerate(zip(drawn.rollouts, logprobs, strict=True)):
        others = [x for k, x in enumerate(rewards) if k != i and drawn.rollouts[k].group == rollout.group]
        terms.append(-(rewards[i] - sum(others) / len(others)) * (new - new.detach()).exp())
    return mean_of_means(terms)


STEP = {"method": "srpo", "normalize": "group_step"}
NARROW = {"clip_eps_low": 0.05, "clip_eps_high": 0.06}
CASES: dict[str, tuple[Callable[[Drawn, Terms], torch.Tensor], dict[str, Any], bool]] = {  # formula, settings, off-policy
    "grpo": (grpo, {"advantage": {"method": "grpo"}}, True),
    "grpo_star": (grpo_star, {"advantage": {"method": "grpo_star"}}, True),
    "dr_grpo": (dr_grpo, {"advantage": {"method": "grpo", "scale": "none"}, "loss": {"denominator": "constant"}}, True),
    "dapo": (
        dapo,
        {
            "advantage": {"method": "grpo_step_sum"},
            "loss": {"clip_eps_high": 0.28, "denominator": "token_mean", "overlong": "mask"},
        },
        True,
    ),
    "gspo": (gspo, {"advantage": {"method": "grpo"}, "loss": {"ratio_over": "sequence", **NARROW}}, True),
    "srpo": (srpo, {"advantage": STEP}, True),
    "srpo_step_ratio": (srpo_step_ratio, {"advantage": STEP, "loss": {"ratio_over": "step", **NARROW}}, True),
    "cispo": (
        cispo,
        {
            "advantage": {"method": "grpo"},
            "loss": {"clip_form": "cispo", "clip_eps_low": 1.0, "clip_eps_high": 0.3, "denominator": "token_mean"},
        },
        True,
    ),
    "dual_clip": (dual_clip, {"advantage": {"method": "grpo"}, "loss": {"dual_clip": 1.5}}, True),
    "reinforce": (reinforce, {"advantage": {"method": "reinforce"}}, False),
    "rloo": (rloo, {"advantage": {"method": "rloo"}}, False),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", CASES)
def test_a_variant_is_its_paper_s_formula(tmp_path: Path, name: str, seed: int) -> None:
    formula, changes, off_policy = CASES[name]
    cfg, drawn = settings(**changes), draw(seed)
    batch = packed(drawn, cfg)
    loss, gradient, metrics = stepped(batch if off_policy else batch.with_(old_logprobs=None), drawn, cfg, tmp_path)
    logits = drawn.logits.clone().requires_grad_()
    want = formula(drawn, drawn.logprobs(logits))
    (want_gradient,) = torch.autograd.grad(want, logits)
    assert float((gradient - want_gradient).norm()) <= 1e-6 * float(want_gradient.norm())
    if off_policy:
        assert loss == pytest.approx(want.item(), rel=1e-6, abs=1e-7)  # weights and advantages are fp32
        assert metrics["policy/clip_frac"] > 0.05
    assert float(want_gradient.norm()) > 1e-3


@pytest.mark.parametrize("name", [name for name in CASES if name != "srpo"])
def test_the_file_of_a_variant_asks_for_its_formula(name: str) -> None:
    """The files choose the width of the bounds, and the reward of DAPO's advantage, freely."""
    cfg = apply_toml(Config(), BASELINES / f"{name}.toml")
    for section, changes in CASES[name][1].items():
        for key, value in changes.items():
            got = getattr(getattr(cfg, section), key)
            if key in ("clip_eps_low", "clip_eps_high", "dual_clip"):
                assert got > 0, key
            elif key != "normalize" and (name, key) != ("dapo", "method"):
                assert got == value, key
    if name == "dapo":
        assert cfg.loss.clip_eps_high > cfg.loss.clip_eps_low and cfg.sampler.refill
    group_step = apply_toml(Config(), BASELINES / "srpo_group_step.toml")
    assert (group_step.advantage.method, group_step.advantage.normalize) == ("srpo", "group_step")
