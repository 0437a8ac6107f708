"""What every room uses: settings, steps, rollouts and batches, metrics, tables, run folders."""
