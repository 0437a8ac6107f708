"""Offline selection of training data (4.1, 5.5): records of sampled groups, and the criteria that keep examples."""
