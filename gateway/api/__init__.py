"""Endpoints of the HTTP interface."""
