"""The NumPy backend. `ops.py` is the readable specification of every operation."""
