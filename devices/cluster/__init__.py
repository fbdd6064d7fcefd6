"""Boards of other hosts, through Ray. Start at `ray_board.py`; `on_host.py` runs on the host that has the way to a board."""
