"""Dead letters: what could not be delivered, kept whole with the reason, looked through, replayed and dropped."""
