"""Runs and tasks over the processes and machines of a Ray cluster; only `cli` imports it."""
