"""What a user sees of a long loop."""

from tqdm import tqdm


def progress(iterable, title, total):
    """A tqdm bar in a terminal, nothing in a pipe or a log."""
    return tqdm(iterable, title, total, leave=False, dynamic_ncols=True, disable=None)
