"""MiniMax-M1 in JAX: model, training with CISPO, inference and conversion."""
