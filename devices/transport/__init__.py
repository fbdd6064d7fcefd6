"""How a board is reached, over ssh, adb or on this machine, and asked: `connection.py` is the host's side of the agent.

Commands and requests go in, their answers come out, each within a deadline. Start at `base.py`.
"""
