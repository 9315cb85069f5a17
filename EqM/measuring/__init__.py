"""The benchmark: workloads with random inputs, their speed and memory, and whether ways to compute them agree."""
