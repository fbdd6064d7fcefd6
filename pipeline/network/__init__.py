"""Helpers for any `nn.Module` that know no stage: cost, modes, BatchNorm statistics, weights on disk.

In and out: a module. Start at `modes.py`; nothing here knows what is pruned.
"""
