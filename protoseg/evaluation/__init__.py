"""Prediction for images of any size, and what it is worth on labelled ones."""
