"""Tensor operations and KV memory that several techniques share."""
