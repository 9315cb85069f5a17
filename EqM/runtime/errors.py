"""What goes wrong: errors that a person can mend, and how to tell what others mean."""

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
    """Something the person at the keyboard can mend; its text says what is wrong and what to do."""


def is_out_of_memory(error: Exception) -> bool:
    """True for Python's, CUDA's and the CPU allocator's ways of saying that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(words in str(error) for words in OUT_OF_MEMORY_WORDS)


def is_lost_process(error: Exception) -> bool:
    """True where an exchange with other ranks failed, mostly because one has gone."""
    return isinstance(error, dist.DistError) or any(words in str(error) for words in LOST_PROCESS_WORDS)


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
