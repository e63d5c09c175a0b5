"""Weights of other programs in, ours out."""
