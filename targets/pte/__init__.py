"""Files of ExecuTorch's XNNPACK backend (.pte): lowered from an exported graph, quantized there, and run."""
