"""Weights on their way from trainer to engine: buckets, shared memory, CUDA IPC."""
