"""What the user wants compressed: a network, its data and how images become inputs.

In: the specs of the command line (`--model`, `--weights`, `--data`). Out: `Loaded`, the live network with its splits. Start
at `load.py`.
"""
