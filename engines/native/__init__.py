"""The native executor: a whole decode step in one call of the C library."""
