"""How far a loss rises near θ: the sets, the function on them, one search or one draw at a time.

`landscape.metrics.Sharpness` puts these together.
"""
