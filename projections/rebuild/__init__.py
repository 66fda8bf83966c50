"""Building a projection anew beside the live one, then switching to it."""
