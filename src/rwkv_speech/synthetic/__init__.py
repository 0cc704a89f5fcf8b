"""Synthetic speech, and everything that makes the embedded default."""
