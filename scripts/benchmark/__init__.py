"""What `scripts/bench.py` measures, a suite a file, and how."""
