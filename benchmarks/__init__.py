"""Benchmarks: every result carries its machine, its versions and a parity check made in the same run. See README.md."""
