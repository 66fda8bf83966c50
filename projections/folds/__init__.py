"""The pure folds: what a log makes of counts, inbox and deliveries, held against every store."""
