"""The one protocol by which latency is measured, on this machine and on boards.

Loaded models come in; samples (`rounds.py`), quick ratios (`meter.py`) and figures with intervals (`timing.py`, `stats.py`) go
out. Start at `timing.py`.
"""
