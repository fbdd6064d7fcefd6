"""The graph core: a network and an example go in; what can be removed from it, and the network without it, come out.

Start at `inspect.py`; then `capture` (export), `walk` and `rules/` (labels of axes), `resolve` and `coupling` (groups);
`cutting/` removes units from the user's own module, its `gate` proves that cut equals zeroed.
"""
