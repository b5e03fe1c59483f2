"""semwatch: streaming edge inference for SEM defect review."""

import os

# ONNX Runtime would tell its maker about each run; a fab's workstation tells nobody. Read when it is first imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
