"""How right a judge is: scores of verdicts and steps, intervals, comparisons, pages (5.1.2, Table 2)."""
