"""The default detector: a segmentation branch on frozen features, trained on planted and synthetic defects.

May import: `data`, `trunks`, `synthetic`, `system`.
Start reading: `segmentation_branch.py`.
"""
