"""Following single notifications through every process: contexts, spans, their export (ADR 0046)."""
