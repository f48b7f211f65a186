"""The rounds: who takes part, who is waited for, what becomes of the updates."""
