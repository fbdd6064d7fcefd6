"""The artifact of a target, built from the trained, pruned network.

In: the network and a `Target`. Out: an `Artifact` in artifacts/TARGET. Start at `artifact.py`.
"""
