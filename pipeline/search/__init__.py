"""Finds the pruning ratios: the best accuracy on the search split within the latency budget.

In: an evaluator (room `evaluate/`). Out: a `SearchResult`, best candidates first.
Start at `problem.py` for what is asked and `search.py` for how it is answered.
"""
