"""How good samples are: features, distances, neighbours, intervals."""
