"""Training of the step judge (4.3.1): judgments, hard cases, the human queue, the stages of `srpo.train_judge`."""
