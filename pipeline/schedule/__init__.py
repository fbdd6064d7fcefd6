"""How long a run will take, told before the search begins, and what is done where there is less time than that.

In: the loaded network, its knobs, and the options. Out: seconds by stage, and options that fit `--max-minutes`. Start at
`estimate.py`.
"""
