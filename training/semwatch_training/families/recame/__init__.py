"""ReCAME-Net for the long tail: an encoder that keeps regions of the crop, and a head of experts and their student.

May import: `smg_vit`, whose encoder this one carries, `trunks`, `metrics`, `system`.
Start reading: `network.py`, then `fit_recame.py`.
"""
