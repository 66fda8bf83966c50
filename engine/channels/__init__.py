"""The ways to a person beside the app: each module renders for one of them, and sends to its providers."""
