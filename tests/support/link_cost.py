"""What a request to a board costs besides its work."""

import time

import numpy as np
from edge_compress.devices.transport.connection import Connection


def overhead_ms(agent: Connection, requests: int = 200) -> float:
    """Median milliseconds of a request that does nothing on the board: what the link and the agent cost."""
    spent = []
    for _ in range(requests):
        started = time.perf_counter()
        agent.stream.ask({"op": "ping"}, 20.0, "a request without work")
        spent.append(time.perf_counter() - started)
    return float(np.median(spent)) * 1e3
