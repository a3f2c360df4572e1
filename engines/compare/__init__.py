"""Many queries, every method, one at a time: an unattended comparison that survives being killed."""
