"""Compile and launch kernels. This room knows no networks, and importing it imports no CuPy."""
