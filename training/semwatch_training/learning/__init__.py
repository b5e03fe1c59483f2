"""Learning on the job: unknowns become classes, judged before they serve."""
