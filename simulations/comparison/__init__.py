"""A comparison: its grid, its search for learning rates, its scheduler."""
