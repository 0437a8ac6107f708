"""Proves a GPU in ten minutes: `python bench/gpu_proof` (docs/gpu_proof.md)."""
