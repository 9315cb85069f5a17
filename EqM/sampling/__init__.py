"""From noise to a file: where samples start, how they descend, what they leave."""
