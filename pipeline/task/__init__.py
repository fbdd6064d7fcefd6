"""Loads what is to be compressed: a network, its data, and the preprocessing between them.

In: the specs of the command line (`--model`, `--weights`, `--data`). Out: `Loaded`, the live network with its three splits.
Start at `load.py`.
"""
