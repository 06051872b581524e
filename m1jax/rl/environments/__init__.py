"""Environments: tools, and adapters to the games of other packages."""
