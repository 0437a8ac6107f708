"""Rollouts: the `Engine` protocol, the engines that implement it, and the conversion of their samples to `Rollout`s."""
