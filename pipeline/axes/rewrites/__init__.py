"""Parts of the user's network that are replaced before it is analysed, each by one that computes the same and can be cut.

In: a copy of the module, and where in its exported graph such parts are. Out: the copy, changed, and what was done to it.
`capture.py` calls both.
"""
