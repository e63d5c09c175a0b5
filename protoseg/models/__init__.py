"""Backbones, decode heads, and the segmenter made of them."""
