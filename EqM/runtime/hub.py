"""Asks the Hugging Face hub whether it can be reached, before a library asks it for minutes."""

from queue import Empty, SimpleQueue
from threading import Thread

from runtime.errors import UserError, first_line

TIMEOUT_S = 5  # for the hub's first answer


def check_hub(source: str, flag: str) -> None:
    """Raises UserError if the hub does not show the config.json of the repository `source` in time.

    The libraries ask six times, which takes half a minute, and then blame a file. A thread asks here, since looking up
    a name has no time limit.

    Args:
        flag: how people name a folder in place of the repository, for the message.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    problems: SimpleQueue[str] = SimpleQueue()

    def ask() -> None:
        try:
            get_hf_file_metadata(hf_hub_url(source, "config.json"), timeout=TIMEOUT_S)
            problems.put("")
        except Exception as error:  # each version of the package has its own error types
            problems.put(first_line(error))

    Thread(target=ask, daemon=True).start()
    try:
        problem = problems.get(timeout=TIMEOUT_S)
    except Empty:
        problem = "no answer"
    if problem:
        advice = f"download it where the hub can be reached, and give its folder as {flag}"
        where = f"the Hugging Face hub cannot be reached ({problem}), and {source} is not in its cache"
        raise UserError(f"{where}: {advice}")
