"""Choosing what to take out: candidates, what they cost, and the pick among them."""
