"""`edge-compress verify`: a run, a bundle or an artifact is checked against its own record.

In: a path. Out: checks passed or failed, one line each. Start at `audit.py`.
"""
