"""The artifact in its own runtime: accuracy on the test split, latency on its device, golden samples, the gates.

In: an `Artifact` and the PyTorch references. Out: a `TargetResult` with its verdict. Start at `artifact.py`; for engines,
which are finished on a board, at `engine/result.py`. The rules of the gates are in `gates.py`.
"""
