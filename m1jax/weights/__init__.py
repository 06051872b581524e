"""A model's weights as Hugging Face files: one bijective table of names, readers and writers of safetensors."""
