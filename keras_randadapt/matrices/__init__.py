"""Decompositions and combinations of matrices, in NumPy and float64."""
