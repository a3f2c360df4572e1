"""Memory of the KV cache: token-major, contiguous in virtual memory, committed page group by page group."""
