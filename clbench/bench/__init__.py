"""Benchmarks: rates of the machine, seconds of the learners, and seconds of naive implementations."""
