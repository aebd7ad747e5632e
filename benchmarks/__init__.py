"""python -m benchmarks: checks, then times, then draws; peers beside the project. Run from the repository's root."""
