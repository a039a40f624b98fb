"""Bytes of checkpoints, and how numbers are stored in them; knows no model."""
