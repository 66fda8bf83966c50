"""What crosses a process boundary: subjects, events, records, cursors, frames, close codes; the same for everyone."""
