"""Examples, the catalogue world, readers, prompts, selection (paper 4.1, 4.2)."""
