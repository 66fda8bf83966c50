"""What HTTP endpoints share: problems, bodies, cross-origin answers."""
