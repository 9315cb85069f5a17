"""Speed, memory and agreement of different ways to compute (benchmark.py), and comparisons of variants (study.py)."""
