"""The planner: decides for each record who gets it when and by which channel, and writes that down."""
