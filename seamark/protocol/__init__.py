"""What crosses a process boundary: subjects, events, records, cursors, close codes; the same for everyone."""
