"""A program asks its host while it runs; see `api`."""

from pallas_kernels.mailbox.api import ask, tell
from pallas_kernels.mailbox.layout import SECONDS, Layout, Memory, at

__all__ = ["SECONDS", "Layout", "Memory", "ask", "at", "tell"]
