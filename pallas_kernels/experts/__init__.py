"""Dropless mixture-of-experts feed-forward; see `api.expert_mlp`."""

from pallas_kernels.experts.api import expert_mlp

__all__ = ["expert_mlp"]
