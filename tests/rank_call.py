"""Calls the function that `conftest.spawn` left in a file, with this process's rank and the arguments left with it."""

import os
import pickle
import sys
from pathlib import Path

if __name__ == "__main__":
    with Path(sys.argv[1]).open("rb") as file:
        sys.path = pickle.load(file)
        function, arguments = pickle.load(file)
    function(int(os.environ["RANK"]), *arguments)
