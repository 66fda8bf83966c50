"""The directory: whom notifications can go to, and what a tenant says of them."""
