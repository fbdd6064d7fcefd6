"""Requirements of TensorRT on an ONNX file: Q/DQ placement, lint, parser, latency estimate, for the target `jetson`.

Start at `qdq.py`.
"""
