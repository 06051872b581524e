"""Does it fit, how fast can it be, what does it cost: planned for hardware that is not here (`m1jax plan`)."""
