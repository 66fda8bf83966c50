"""How far notifications come, counted."""
