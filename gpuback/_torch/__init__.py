"""What `gpuback.torch` is made of; the only part of gpuback that knows PyTorch."""
