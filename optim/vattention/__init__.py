"""KV cache in reserved virtual memory."""
