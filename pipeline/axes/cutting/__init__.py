"""Removes units from the user's own module: surgery on parameters, corrected sizes, and the gate that cut equals zeroed.

In: a `Coupling` and the units that go. Out: a smaller module of the same class. Start at `surgery.py`.
"""
