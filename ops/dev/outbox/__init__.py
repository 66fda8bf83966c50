"""The outbox of a development stack: simulated providers of every channel, and a page that shows what they have accepted.

Nothing that a stack sends leaves this machine: its worker knows no other providers than these.
"""
