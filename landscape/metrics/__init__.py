"""One file per metric; `base` is the interface they share."""
