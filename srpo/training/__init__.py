"""The phases of the loop in `srpo.train`, the optimizer step, and supervised training."""
