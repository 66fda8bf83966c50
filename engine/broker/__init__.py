"""The broker as the engine uses it: one connection, its hot path, and JetStream on top."""
