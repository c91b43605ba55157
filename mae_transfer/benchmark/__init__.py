"""Ours and the peers timed in one run: ``tools/benchmark.py pretrain | loader | masking | detection | evaluation``."""
