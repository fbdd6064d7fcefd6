"""Boards with TensorRT: engines are built, asked and timed there. Start at `device.py`."""
