"""Synthetic data in the challenge's format."""
