"""Pictures: each file prepares plain arrays from a dataset, then draws them."""
