"""Text messages: their segments, the providers that send them, and what providers report of them."""
