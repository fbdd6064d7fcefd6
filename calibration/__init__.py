"""Which samples and which ranges an int8 artifact is calibrated with."""
