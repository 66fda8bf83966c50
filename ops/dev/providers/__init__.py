"""Simulated providers: they speak the real protocols, remember what they have accepted, and fail when they are told to.

Tests send to them, and so does `seamark dev`: what they accepted is what people would have got.
"""
