"""Finished runs and files in, masks out: in Python, on the command line, as a local page, as a model file."""
