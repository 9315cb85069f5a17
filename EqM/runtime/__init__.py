"""What all rooms use: processes, files, the log, errors, flags, random numbers."""

import sys

if sys.platform == "win32":
    raise SystemExit("error: EqM locks folders and flushes them as only Linux and macOS do: on Windows, run it in WSL")
