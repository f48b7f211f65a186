"""What a run leaves behind: its folder, its lines, and what they show."""
