"""Draws of a call: how many of which units are kept, made before its graph runs; and what is recorded of them."""
