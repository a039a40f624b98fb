"""A live model, and what it computes."""
