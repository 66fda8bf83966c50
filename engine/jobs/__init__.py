"""The life of a job: from the message in JOBS to a stored fact that says how it ended."""
