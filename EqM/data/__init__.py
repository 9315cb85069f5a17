"""From files to the network's input."""
