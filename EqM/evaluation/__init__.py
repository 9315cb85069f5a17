"""How good samples are: features, distances, a judge, the report."""
