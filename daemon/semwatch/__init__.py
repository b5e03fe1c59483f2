"""semwatch: streaming edge inference for SEM defect review."""
