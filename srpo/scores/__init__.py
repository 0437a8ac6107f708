"""Accuracy of a judge: scores of verdicts and steps, intervals, comparisons, result pages, plots (5.1.2, Table 2)."""
