"""Caches and runs in an object store."""
