"""Layer-wise reconstruction: the remaining weights are re-fit on the calibration set.

In: a plan and calibration inputs. Out: the pruned network with least-squares weights (`least_squares.py`), OBS masks
(`optimal_brain_surgeon.py`), GPTQ rounding (`gptq.py`). Start at `sequential.py`.
"""
