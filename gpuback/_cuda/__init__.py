"""Everything that knows CUDA: kernel sources, their compilation, plans and launches. Importing it imports no CuPy."""
