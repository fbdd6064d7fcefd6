"""`report.json` and the pages made from it alone.

In: the results of a run. Out: report.json, report.md, report.html, the comparison of several runs. Start at `report.py`.
"""
