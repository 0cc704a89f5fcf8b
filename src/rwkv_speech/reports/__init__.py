"""What a run leaves behind, and the page made of it."""
