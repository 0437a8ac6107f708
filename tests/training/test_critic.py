"""PPO: token-level advantages and the critic's updates against plain fp64 loops; the critic as a model."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import policy_lab as lab
import pytest
import torch
from torch import nn
from variant_cases import NAMES, ONE, Drawn, Terms, clipped, draw, mean_of_means, packed, ratios, settings, spans, stepped

from srpo.core.batch import Batch, pack
from srpo.policy.checkpoint import load_checkpoint, save_checkpoint
from srpo.policy.critic import Critic
from srpo.training.ppo import update_critic, with_token_advantages
from srpo.training.token_advantages import TokenBatch, loss_tables
from srpo.training.update import NonFiniteError, read_dump


class Values(nn.Module):
    """A critic whose values are parameters: one per response token."""

    def __init__(self, values: torch.Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values)

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.values + 0


def plain_advantages(drawn: Drawn, values: Terms, at: str, gamma: float, lam: float, clip: float) -> tuple[Terms, Terms]:
    """(whitened GAE advantages, returns) per response, by loops."""
    raw, returns = [], []
    for rollout, v in zip(drawn.rollouts, values, strict=True):
        length = len(rollout.response_ids)
        rewards = [0.0] * length
        for end, reward in zip(rollout.step_ends, rollout.step_rewards or (), strict=True):
            rewards[max(end - 1, 0) if at == "step_ends" else length - 1] += reward
        state, advantage = [*v.tolist(), 0.0], [0.0] * (length + 1)
        for t in reversed(range(length)):
            advantage[t] = rewards[t] + gamma * state[t + 1] - state[t] + gamma * lam * advantage[t + 1]
        raw.append(torch.tensor(advantage[:-1], dtype=torch.float64))
        returns.append(raw[-1] + v)
    flat = torch.cat(raw)
    return [((x - flat.mean()) / (flat.std() + 1e-8)).clamp(-clip, clip) for x in raw], returns


@pytest.mark.parametrize("seed", range(4))
def test_ppo_is_plain_ppo(tmp_path: Path, seed: int) -> None:
    at, gamma, lam = [("step_ends", 1.0, 0.95), ("end", 0.99, 0.9)][seed % 2]
    cfg, drawn = settings(advantage={"method": "ppo", "clip": 2.0}), draw(seed)
    values = torch.randn(len(drawn.logits), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    per_response = list(values.split([len(r.response_ids) for r in drawn.rollouts]))
    (batch,), seen = with_token_advantages(
        [packed(drawn, cfg)],
        Values(values),
        ONE,
        rewards=at,  # type: ignore[arg-type]
        gamma=gamma,
        gae_lambda=lam,
        scale="std",
        clip=2.0,
    )
    want, returns = plain_advantages(drawn, per_response, at, gamma, lam, 2.0)
    rows = batch.rows()[1]
    assert isinstance(rows, TokenBatch)
    torch.testing.assert_close(rows.advantages.double(), torch.cat(want), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rows.returns.double(), torch.cat(returns), rtol=1e-6, atol=1e-6)
    assert seen["advantage/abs_mean"] == pytest.approx(float(torch.cat(want).abs().mean()), rel=1e-6)
    assert seen["advantage/clip_frac"] == pytest.approx(float((torch.cat(want).abs() == 2).double().mean()))
    residual = torch.cat(returns) - values
    assert seen["critic/explained_var"] == pytest.approx(1 - float(residual.var() / torch.cat(returns).var()), rel=1e-6)
    assert seen["critic/value"] == pytest.approx(float(values.mean()), rel=1e-6)

    loss, gradient, metrics = stepped(batch, drawn, cfg, tmp_path)
    logits = drawn.logits.clone().requires_grad_()
    each = list(zip(ratios(drawn, drawn.logprobs(logits)), want, strict=True))
    plain = mean_of_means([clipped(ratio, advantage, 0.2, 0.2) for ratio, advantage in each])
    assert loss == pytest.approx(plain.item(), rel=1e-6, abs=1e-7)
    (want_gradient,) = torch.autograd.grad(plain, logits)
    assert float((gradient - want_gradient).norm()) <= 2e-6 * float(want_gradient.norm())
    # The metrics per reasoning step cover the tokens of that step.
    for j, name in enumerate(NAMES):
        cuts = [spans(rollout)[j] for rollout in drawn.rollouts]
        ratio = torch.cat([r[cut] for (r, _), cut in zip(each, cuts, strict=True)]).detach()
        advantage = torch.cat([a[cut] for (_, a), cut in zip(each, cuts, strict=True)])
        cut_off = torch.where(advantage > 0, ratio > 1.2, ratio < 0.8) & (advantage != 0)
        assert metrics[f"policy/ratio/{name}"] == pytest.approx(float(ratio.mean()), rel=1e-6)
        assert metrics[f"policy/clip_frac/{name}"] == pytest.approx(float(cut_off.double().mean()), abs=1e-9)
    assert metrics["train/num_tokens"] == len(values)


def test_tables_with_the_step_s_advantage_on_each_token_are_the_step_tables(tmp_path: Path) -> None:
    """SRPO's loss from advantages [N, J] equals PPO's loss if every token has the advantage of its step."""
    cfg, drawn = settings(advantage={"normalize": "group_step"}), draw(9)
    batch = packed(drawn, cfg)
    per_token = [
        batch.step_advantages[i, j].repeat(span.stop - span.start)
        for i, rollout in enumerate(drawn.rollouts)
        for j, span in enumerate(spans(rollout))
    ]
    filled, _ = with_token_advantages(
        [batch],
        Values(torch.zeros(len(drawn.logits))),
        ONE,
        rewards="end",
        gamma=1.0,
        gae_lambda=1.0,
        scale="std",
        clip=0.0,
    )
    spread = torch.zeros(len(batch.labels)).index_copy(0, batch.rows()[0], torch.cat(per_token))
    tokens = replace(filled[0], advantages=spread)
    loss, gradient, metrics = stepped(batch, drawn, cfg, tmp_path)
    other_loss, other_gradient, other_metrics = stepped(tokens, drawn, cfg, tmp_path)
    assert loss == pytest.approx(other_loss, rel=1e-12) and metrics == pytest.approx(other_metrics, rel=1e-12)
    torch.testing.assert_close(gradient, other_gradient, rtol=0, atol=1e-15)
    assert loss_tables(tokens.rows()[1]).step_ends.shape == (len(drawn.logits), 5)


@pytest.mark.parametrize("value_clip", [0.0, 0.2])
def test_the_critic_s_step_is_the_clipped_value_loss(tmp_path: Path, value_clip: float) -> None:
    cfg, drawn = settings(advantage={"method": "ppo"}), draw(2)
    start = torch.randn(len(drawn.logits), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (batch,), _ = with_token_advantages(
        [packed(drawn, cfg)],
        Values(start),
        ONE,
        rewards="step_ends",
        gamma=1.0,
        gae_lambda=0.9,
        scale="std",
        clip=0.0,
    )
    _, returns = plain_advantages(
        drawn, list(start.split([len(r.response_ids) for r in drawn.rollouts])), "step_ends", 1.0, 0.9, 9.0
    )
    target, critic = torch.cat(returns), Values(start.clone())
    metrics = update_critic(
        critic,
        torch.optim.SGD(critic.parameters(), lr=60.0),
        [batch],
        ONE,
        value_clip=value_clip,
        num_updates=2,
        grad_clip=0.0,
        dump=tmp_path / "dump.pt",
    )
    values, loss, cut = start.clone(), torch.zeros(()), torch.zeros(0)
    for _ in range(2):
        moved = values.requires_grad_()
        held = start + (moved - start).clamp(-value_clip, value_clip) if value_clip else moved
        terms = torch.max((moved - target) ** 2, (held - target) ** 2) / 2
        cut = ((held - target) ** 2 > (moved - target) ** 2) & ((moved - start).abs() > value_clip)
        loss = terms.mean()
        values = (moved - 60.0 * torch.autograd.grad(loss, moved)[0]).detach()
    assert metrics["critic/loss"] == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(critic.values.detach(), values, rtol=1e-5, atol=1e-5)
    assert metrics["critic/clip_frac"] == pytest.approx(float(cut.double().mean()) if value_clip else 0.0)
    assert not value_clip or metrics["critic/clip_frac"] > 0.05
    assert math.isfinite(metrics["critic/grad_norm"])


# ---- the critic as a model -----------------------------------------------------------------------------------------------------


def trained_critic() -> Critic:
    """A critic whose head is not 0, as after training."""
    critic = Critic(lab.tiny(3))
    torch.nn.init.normal_(critic._head().weight, generator=torch.Generator().manual_seed(0))
    return critic


def test_a_critic_starts_at_0_and_shares_nothing_with_the_policy() -> None:
    model = lab.tiny(3)
    critic = Critic(model)
    (batch,) = lab.batches(0)
    values = critic(batch)
    assert values.shape == batch.rows()[1].labels.shape and values.dtype == torch.float32 and not values.any()
    values.sum().backward()
    names = {name for name, p in critic.named_parameters() if p.grad is not None and p.grad.any()}
    assert names == {"model.value_head.weight", "model.value_head.bias"}  # a head of 0 passes no gradient on
    assert not any("lm_head" in name for name, _ in critic.named_parameters())


def test_a_value_reads_what_stands_before_its_token() -> None:
    """Packing changes no value, and the value of a row does not depend on the token that the row predicts."""
    critic = trained_critic()
    together = torch.cat([critic(b) for b in lab.batches(4)])
    apart = torch.cat([critic(b) for b in lab.batches(4, 22)])
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-6 * float(together.detach().abs().max()))
    rollouts = lab.rollouts(1, [(4, 6)])
    changed = replace(rollouts[0], response_ids=(*rollouts[0].response_ids[:3], 7, *rollouts[0].response_ids[4:]))
    before, after = (critic(pack([r], torch.zeros(1, 3), torch.ones(1))[0]) for r in (rollouts[0], changed))
    assert torch.equal(before[:4], after[:4]) and not torch.equal(before[4:], after[4:])


def test_a_critic_learns_what_a_prompt_is_worth(tmp_path: Path) -> None:
    critic = Critic(lab.tiny(3))
    optimizer = torch.optim.AdamW(critic.parameters(), lr=1e-2)
    rollouts = lab.rollouts(1, [(4, 6)] * 8)
    rewards = torch.zeros(8, 3)
    rewards[:, 2] = torch.arange(8) % 2
    explained = []
    for _ in range(25):
        batches, seen = with_token_advantages(
            pack(rollouts, rewards, torch.ones(8), 30),
            critic,
            ONE,
            rewards="end",
            gamma=1.0,
            gae_lambda=1.0,
            scale="std",
            clip=2.0,
        )
        explained.append(seen["critic/explained_var"])
        update_critic(critic, optimizer, batches, ONE, value_clip=0.5, num_updates=1, grad_clip=1.0, dump=tmp_path / "d.pt")
    assert explained[0] == 0 and explained[-1] > 0.9
    assert seen["advantage/abs_mean"] <= 2 and seen["critic/value"] == pytest.approx(0.5, abs=0.1)


def test_checkpoints_hold_the_head(tmp_path: Path) -> None:
    def step(critic: Critic, optimizer: torch.optim.Optimizer) -> None:
        batches, _ = with_token_advantages(
            lab.batches(4, 20), critic, ONE, rewards="step_ends", gamma=1.0, gae_lambda=0.9, scale="std", clip=2.0
        )
        update_critic(critic, optimizer, batches, ONE, value_clip=0.2, num_updates=2, grad_clip=1.0, dump=tmp_path / "d.pt")

    critic, other = trained_critic(), Critic(lab.tiny(4))
    optimizer, other_optimizer = (torch.optim.AdamW(c.parameters(), lr=1e-2) for c in (critic, other))
    step(critic, optimizer)
    path = save_checkpoint(tmp_path, 1, critic, optimizer, {}, ONE)
    load_checkpoint(path, other, other_optimizer, ONE)
    for _ in range(2):
        assert lab.same_bits(lab.train_state(critic, optimizer), lab.train_state(other, other_optimizer))
        step(critic, optimizer)
        step(other, other_optimizer)


def test_a_batch_with_no_response_to_train_on_is_no_trouble(tmp_path: Path) -> None:
    critic = trained_critic()
    before = [p.clone() for p in critic.parameters()]
    batches, seen = with_token_advantages([], critic, ONE, rewards="end", gamma=1.0, gae_lambda=1.0, scale="std", clip=2.0)
    assert batches == [] and seen == {}
    optimizer = torch.optim.SGD(critic.parameters(), lr=1.0)
    update_critic(critic, optimizer, batches, ONE, value_clip=0.2, num_updates=1, grad_clip=1.0, dump=tmp_path / "d.pt")
    assert all(torch.equal(a, b) for a, b in zip(before, critic.parameters(), strict=True))


def test_what_is_not_finite_stops_before_the_critic_steps(tmp_path: Path) -> None:
    cfg, drawn = settings(advantage={"method": "ppo"}), draw(2)
    critic = Values(torch.zeros(len(drawn.logits), dtype=torch.float64))
    (batch,), _ = with_token_advantages(
        [packed(drawn, cfg)], critic, ONE, rewards="end", gamma=1.0, gae_lambda=1.0, scale="std", clip=0.0
    )
    broken = replace(batch, returns=batch.returns * math.inf)
    with pytest.raises(NonFiniteError):
        update_critic(
            critic,
            torch.optim.SGD(critic.parameters(), lr=1.0),
            [broken],
            ONE,
            value_clip=0.0,
            num_updates=1,
            grad_clip=1.0,
            dump=tmp_path / "d.pt",
        )
    assert not critic.values.any()
    (read,) = read_dump(tmp_path / "d.pt")["batches"]
    assert isinstance(read, TokenBatch) and torch.equal(read.returns.isfinite(), broken.returns.isfinite())
