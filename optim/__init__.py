"""Techniques that act when a model runs; weights keep their meaning."""
