"""The same learning over many processes and machines: ray; only `cli` imports it."""
