"""What can be removed from a network, and removing it.

In: the user's network, traced (`trace.py`). Out: coupled groups of channels and residual blocks (`coupling.py`), a smaller
network (`surgery.py`), the decisions of a search (`knobs.py`, `mask_knobs.py`). Start at `coupling.py`.
"""
