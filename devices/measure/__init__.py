"""How latency is measured: rounds, statistics, the cache of a search's measurements. Start at `timing.py`."""
