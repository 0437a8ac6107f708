"""The policy: model, attention, experts, routing, decoding, critic, scalar reward model, sharding and checkpoints."""
