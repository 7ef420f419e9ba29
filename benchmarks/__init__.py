"""Side-by-side measurements. `python -m benchmarks` runs them, prints tables and writes `results/`.

Everything is interleaved, on one thread, and compared by minima: what else runs on the machine can only add
to a time, never take away from it.
"""
