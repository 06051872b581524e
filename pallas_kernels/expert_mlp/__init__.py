"""Dropless mixture-of-experts feed-forward; see `api.expert_mlp`."""

from pallas_kernels.expert_mlp.api import expert_mlp

__all__ = ["expert_mlp"]
