"""Check compiled kernels: registers, spills, occupancy, matrix instructions. Needs no GPU."""
