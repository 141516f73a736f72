"""Distances between a set of generated arrays and a set of real ones."""
