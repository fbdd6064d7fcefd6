"""Labelled images and the user's code: where images are stored, how they are split, from pixels to network inputs.

In: the specs of `--data`. Out: a `DataSet` of three disjoint splits. Start at `splits.py`.
"""
