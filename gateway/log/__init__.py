"""What all sessions of a partition share: live copies, heads, pages, the leader's word."""
