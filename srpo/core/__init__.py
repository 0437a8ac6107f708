"""Shared by every room: config and settings, steps, rollouts and batches, metrics, tables, progress bars, run folders."""
