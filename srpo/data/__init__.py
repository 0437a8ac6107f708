"""Examples, readers, prompts, preference pairs, the catalogue world, and the sampler with its curriculum (4.1, 4.2)."""
