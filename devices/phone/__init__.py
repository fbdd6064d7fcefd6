"""Android phones without Python: timing and answers through LiteRT's `benchmark_model`. Start at `device.py`."""
