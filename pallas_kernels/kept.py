"""The name of what kernels keep for their backward pass."""

KEPT = "product"
"""For `jax.checkpoint`: a policy that keeps this name (`jax.ad_checkpoint.checkpoint_name`) spares a kernel's results,
which cost more to compute again than to keep."""
