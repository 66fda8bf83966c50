"""What workers do beside the life of a job: whom it goes to, by which provider, and what follows from its end."""
