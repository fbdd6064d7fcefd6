"""Checks a run, a bundle or an artifact against its own record (`edge-compress verify`).

In: a path. Out: checks passed or failed, one line each. Start at `audit.py`.
"""
