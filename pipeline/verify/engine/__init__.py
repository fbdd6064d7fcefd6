"""Artifacts that are finished on the device they are for: built there by TensorRT, asked, compared with the file, timed.

In: the artifact's file and a board. Out: a `TargetResult`. Start at `result.py`; `steps.py` is the work on one board.
"""
