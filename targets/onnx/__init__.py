"""ONNX files: export, editing, quantisation and candidates, shared by the targets `x86` and `jetson`. Start at `export.py`."""
