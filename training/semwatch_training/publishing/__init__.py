"""From weights to the model repository: export to ONNX, parity, placement.

May import: `families`, `discovery` and below.
Start reading: `build_repository.py`.
"""
