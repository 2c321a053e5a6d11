"""The reproducible mode: the same bits on NumPy and on CUDA."""
