"""Reads data sets and turns them into the network's input."""
