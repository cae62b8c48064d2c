"""Golden files, and the program that made them."""
