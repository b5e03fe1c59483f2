"""The model repository: its layout and contract, which version serves, the embedded runtime, what a head was fitted on.

May import: `system`, `defects`, `errors`.
Start reading: `model_repository.py`.
"""
