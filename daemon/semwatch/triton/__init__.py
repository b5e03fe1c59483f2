"""A Triton server in the place of the embedded runtime: its installation, its view of the models, its client.

May import: `models` and below; alone imports tritonclient.
Start reading: `client.py`.
"""
