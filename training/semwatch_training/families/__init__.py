"""Model families, a folder each: form, graph, fit. A family is published by a contract and needs no change in the
daemon's line.

May import: `data`, `trunks`, `metrics` and below; families do not know each other, but `ni` carries `branch`.
Start reading: `detector_run.py`, or the folder of a family.
"""
