"""A finished run as one page for people; never torch."""
