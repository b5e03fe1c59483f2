"""The two demonstrations: one lot through the whole line, and two unseen defect types that become classes.

May import: `classes`, `intake`, `triton`, `deployment` and below.
Start reading: `one_lot.py`.
"""
