"""What all rooms stand on: processes, files, the log, errors, flags, random numbers."""
