"""ONNX files: export, editing, quantisation and candidates, shared by the targets `x86` and `jetson`. Start at `export.py`."""

from importlib.util import find_spec

PACKAGES = ("onnx", "onnxscript", "onnxruntime", "torch")


def missing_packages() -> str | None:
    """Which packages an ONNX file cannot be made without are not installed, with the command that installs them; or None."""
    absent = [name for name in PACKAGES if find_spec(name) is None]
    return f"packages are missing: pip install {' '.join(absent)}" if absent else None
