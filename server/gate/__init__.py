"""The gate: how replies come in, and what must hold of them before anything counts."""
