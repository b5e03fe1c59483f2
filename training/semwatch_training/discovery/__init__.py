"""How many classes there are, which crop is of which, and the head that is deployed (IC-DefectNCD, stage C).

May import: `data`, `trunks`, `metrics` and below.
Start reading: `novel_classes.py`.
"""
