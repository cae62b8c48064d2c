"""Synthetic data sets in the challenge's format."""
