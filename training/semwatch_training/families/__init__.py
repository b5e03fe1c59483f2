"""Stage A: detectors, how each is trained or fitted."""
