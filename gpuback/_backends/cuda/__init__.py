"""The CUDA backend: launch plans, buffers and launches of the kernels. Importing it imports no CuPy."""
