"""Boards, how to reach them, and how latency is measured on them.

In comes a board's name and model files, out come a `Timing` (for the report) or quick ratios (for a search). Read `device.py`
first, then `remote.py`; `opening.py` goes from a board's file to its device, `access.py` from what the user named.
"""
