"""What receipts say of each delivery, in PostgreSQL."""
