"""Latency of given model files on a device, whole and per layer (`edge-compress profile`), and the checks of a board.

In: files and a device. Out: a `Profile` and its page. Start at `profiling.py`.
"""
