"""Memory of normal images: no training, the nearest patches of the most alike images.

May import: `data`, `trunks`, `system`.
Start reading: `memory_detector.py`.
"""
