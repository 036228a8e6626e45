"""What tests and benches share: reference models, games with known answers, simulated engines.

No other folder of the package imports this one. pytest is imported only where a helper needs it.
"""
