"""The kernels for Hopper on a device that lends minutes: checks and times, each safe from the others' failures."""
