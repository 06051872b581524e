"""Linear maps of the few tokens of a decode step; see `api.project`."""

from pallas_kernels.projections.api import Projection, project

__all__ = ["Projection", "project"]
