"""What all rooms use: processes, files, the log, errors, flags, random numbers."""
