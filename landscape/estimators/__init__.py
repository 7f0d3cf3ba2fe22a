"""Matrix-free numerics that know only `shape`, `dtype`, `device` and `@`."""
