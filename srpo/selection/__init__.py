"""Offline selection of training data (4.1, 5.5): records of sampled groups, and which examples are kept."""
