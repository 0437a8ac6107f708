"""The policy: model, experts, attention, parallelism, checkpoints and the optimizer step."""
