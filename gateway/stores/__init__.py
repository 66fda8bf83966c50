"""The projections as a gateway reads them."""
