"""Paired measurements, each in one process; every figure in README and docs comes from one of these."""
