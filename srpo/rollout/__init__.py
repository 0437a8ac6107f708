"""Rollouts: the engine protocol, the engines, and what turns their samples into `Rollout`s."""
