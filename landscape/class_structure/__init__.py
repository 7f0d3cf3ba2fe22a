"""Papyan's decomposition of a classifier's Gauss-Newton matrix by classes; `metrics/class_structure.py` uses it.

`labels` reads the classes, `vectors` makes the mean derivatives, `grams` the parts' spectra from inner products
(numpy only), `spectra` the matrices that are left after a knockout, `outliers` looks at the top eigenvectors,
`tasks` is what can be interrupted, `summary` what a result says, and `embedding` the t-SNE.
"""
