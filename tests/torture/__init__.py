"""A campaign of injected faults: kills inside stages, bit flips, mutated inputs, failed writes. `make torture` runs it.

In: a seed and counts. Out: a JSON file with the counts by outcome and every violation; exit code 1 where there is one.
Start with `__main__.py`. `forks.py` runs the command line in forked children of a process that has imported everything, so
that a run costs what its stages cost; `workshop.py` makes the small network, its data and the reference runs, and replaces
the clock of latency measurements by one that always gives the same: without that no two runs would be comparable.
"""
