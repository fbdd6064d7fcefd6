"""How much each channel or connection matters.

In: the dense network and calibration images. Out: a ranking (`ranking.py`) from magnitude and curvature (`criteria.py`,
`curvature.py`, `removal.py`). Start at `ranking.py`.
"""
