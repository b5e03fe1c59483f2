"""The paper's NI-guided reconstruction (IC-DefectNCD, stage A), alone or beside the branch.

May import: `families.branch`, `trunks`, `system`.
Start reading: `ni_detector.py`.
"""
