"""Word removal: shorter prompts by leaving out every n-th word."""
