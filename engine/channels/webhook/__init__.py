"""Webhooks: signed requests to endpoints that strangers have named, and what becomes of endpoints that do not answer."""
