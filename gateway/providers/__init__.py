"""What providers post: whose it is, what it says, and what follows."""
