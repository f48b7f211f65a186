"""Strategies: from the updates' shared parameters to the next ones."""
