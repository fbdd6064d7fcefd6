"""The report of a run, `report.json`, and the pages made from it alone.

In: the results of a run. Out: report.json, report.md, report.html, the comparison of several runs. Start at `report.py` for the
types, at `collect.py` for how they are filled, at `pages.py` for what is made of them.
"""
