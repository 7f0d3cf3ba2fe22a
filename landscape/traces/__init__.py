"""The ways to a trace: probes, the residual, second differences, deflation, and the pilot that chooses.

They know problems and operators, and return plain arrays; the metric `trace` stores and sums them up.
"""
