"""tilewright: compiles Hugging Face transformers to generated kernels for inference."""
