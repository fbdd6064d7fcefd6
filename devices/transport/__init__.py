"""How a board is reached: ssh, adb or this machine. Start at `base.py`."""
