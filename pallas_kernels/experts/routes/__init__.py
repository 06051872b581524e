"""Which experts a token goes to, for the few tokens of a decode step."""

from pallas_kernels.experts.routes.api import expert_routes

__all__ = ["expert_routes"]
