"""What several test modules share: oracles, networks and layers to try, stand-ins, and what the machine must have."""
