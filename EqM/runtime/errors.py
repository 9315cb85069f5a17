"""Errors that a person can mend, and what other errors mean."""

import torch
import torch.distributed as dist

OUT_OF_MEMORY_WORDS = (
    "DefaultCPUAllocator",
    "std::bad_alloc",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
LOST_PROCESS_WORDS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")


class UserError(Exception):
    """An error that the user can mend. Its text says what is wrong and what to do."""


def is_out_of_memory(error: Exception) -> bool:
    """True if Python, CUDA or the CPU allocator ran out of memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(words in str(error) for words in OUT_OF_MEMORY_WORDS)


def is_lost_process(error: Exception) -> bool:
    """True if an exchange with other ranks failed, mostly because one has ended."""
    return isinstance(error, dist.DistError) or any(words in str(error) for words in LOST_PROCESS_WORDS)


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def shown(text: object) -> str:
    """A text, such as a file's name, as a terminal can show it in one line. What is not printable is escaped.

    These are newlines, control characters, marks that change the direction of writing, and bytes that are no UTF-8.
    """
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(text))
