"""The worker role: what users, controls, providers and tables say of a job."""
