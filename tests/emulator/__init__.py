"""Runs the CUDA kernels of kernels/ on the CPU: what it models and what it does not is in README.md."""

from emulator.build import compiler_missing
from emulator.guarded import GuardedNumpy
from emulator.launcher import Counts, EmulationError, EmulatorLauncher
from emulator.strict import StrictNumpy

__all__ = ["Counts", "EmulationError", "EmulatorLauncher", "GuardedNumpy", "StrictNumpy", "compiler_missing"]
