"""Data sets decoded once, into shards of frames."""
