"""Datasets: a file in, examples with line numbers out, and every row that cannot be used listed with its reason."""
