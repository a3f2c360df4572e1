"""The pages. Gradio only; one module a tab; no tensors."""
