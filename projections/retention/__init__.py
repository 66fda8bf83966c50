"""How long rows are kept, and how months of them leave."""
