"""Who may do what: tokens, API keys, origins, admission."""
