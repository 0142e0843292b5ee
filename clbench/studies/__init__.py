"""Studies: many runs of one question, and its answer."""
