"""The default detector: what an image says about itself, at the image's own scale, read by a trained branch.

May import: `data`, `trunks`, `synthetic`, `system`, `families.branch`.
Start reading: `intrinsic_detector.py`.
"""
