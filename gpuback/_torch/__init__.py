"""The parts of `gpuback.torch`; no other part of gpuback imports PyTorch."""
