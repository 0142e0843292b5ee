"""One run: the loop over a stream, resume, processes, provenance, trackers."""
