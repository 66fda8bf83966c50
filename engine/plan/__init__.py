"""Who gets what, when and by which channel: pure decisions, and the small documents they are made of."""
