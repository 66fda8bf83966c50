"""E-mail: what a message looks like, which relays and services take it, and what their answers say of message and recipient."""
