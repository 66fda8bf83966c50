"""What workers decide with and send by: providers and their limits, targets, templates, and the desk where all of it meets."""
