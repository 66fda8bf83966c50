"""Which gateways there are, and what all of them are asked together."""
