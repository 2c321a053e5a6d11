"""Everything that knows CUDA: kernel sources, their compilation, launch plans, launches. Importing it imports no CuPy."""
