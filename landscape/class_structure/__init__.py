"""Papyan's decomposition of a classifier's Gauss-Newton matrix by classes; `metrics/class_structure.py` uses it.

`labels` reads the classes, `vectors` makes the mean derivatives, `grams` the parts' spectra from inner products,
`spectra` the matrices that are left after a knockout, `outliers` looks at the top eigenvectors. `gram_tasks` and
`spectrum_tasks` are the `work` that can be interrupted, `summary` is what a result says, `embedding` the t-SNE.
"""
