"""Techniques that change weights: quantisation, decomposition, training."""
