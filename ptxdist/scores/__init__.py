"""From counts of pixels to all numbers of an evaluation; with numpy, without torch."""
