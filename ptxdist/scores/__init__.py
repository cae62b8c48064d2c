"""Counts of px in, numbers of an evaluation out."""
