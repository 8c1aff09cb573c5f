"""Weights on disk: safe reading, loading into networks, published files and their download."""
