"""Dropless mixture-of-experts feed-forward and its routes; see `api.expert_mlp`."""

from pallas_kernels.experts.api import exchanges_tokens, expert_mlp
from pallas_kernels.experts.routes import expert_routes

__all__ = ["exchanges_tokens", "expert_mlp", "expert_routes"]
