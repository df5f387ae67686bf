"""A seeded fuzzer over every door: `python -m tests.fuzz --cases 1500 --seed 0`."""
