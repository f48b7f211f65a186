"""What a network is trained for: its loss, its metrics, what its targets look like."""
