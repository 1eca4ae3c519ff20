"""Studies: schemes x depths x tasks x seeds planned, run in parallel, read back and reported."""
