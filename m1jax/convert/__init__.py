"""Checkpoints in and out: the official files, Transformers' ``minimax`` and Orbax, by one table of names."""
