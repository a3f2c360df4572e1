"""How fast decode, prefill, the KV cache and the kernels are, against what the machine allows."""
