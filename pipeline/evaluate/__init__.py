"""Evaluates one candidate: accuracy in the artifact's precision on the reward images, latency on the device, file size.

In: a ranking and the levels of a setting. Out: a `Candidate`. Start at `unit_evaluator.py` (units and blocks) or
`mask_evaluator.py` (single connections); both work in the `Bench` of `evaluation_context.py`.
"""
