"""Prunes by the chosen `--pattern`: channels make the network smaller, masks put zeros in place.

In: the captured network and the target's limits. Out: knobs, an evaluator, a plan and the pruned network. Start at `base.py`.
"""
