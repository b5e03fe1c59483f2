"""The encoder: soft-mask-guided ViT (IC-DefectNCD, stage B) and its self-supervision.

May import: `data`, `trunks`, `synthetic`, `system`.
Start reading: `smg_vit.py`.
"""
