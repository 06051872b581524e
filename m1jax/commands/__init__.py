"""Commands that join several parts; those of one part stand in that part."""
