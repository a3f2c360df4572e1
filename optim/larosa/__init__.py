"""LaRoSA: activations rotated layer by layer, their smallest entries dropped, the weights those entries meet not needed."""
