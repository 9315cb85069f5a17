"""Data sets decoded once, into memory-mapped shards."""
