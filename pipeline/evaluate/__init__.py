"""Evaluates one candidate: accuracy in the artifact's precision on the reward images, latency on the device, file size.

In: a ranking and the levels of a setting. Out: a `Candidate`. Start at `channel_evaluator.py` (channels and blocks) or
`mask_evaluator.py` (single connections); both work in the `Bench` of `evaluation_context.py`.
"""
