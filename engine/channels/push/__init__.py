"""Push to phones and browsers: what is shown, what of it fits, and the three providers that bring it there."""
