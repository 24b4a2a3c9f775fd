"""Opening the store of a bucket, and what goes wrong with it as errors of the operating system."""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ..errors import RepaError
from .environment import check_environment

if TYPE_CHECKING:
    from collections.abc import Iterator

    from obstore.store import BackoffConfig

# of a request that the server refuses for now, a quarter of a second apart and then up to three times as long
# as before, by chance: 5 to 30 s in all
_RETRIES = 8
_BACKOFF: BackoffConfig = {
    "init_backoff": timedelta(milliseconds=250),
    "max_backoff": timedelta(seconds=10),
    "base": 3,
}
# where the package looks for credentials last, on a machine of the cloud; and what should have told them
_METADATA_SERVERS = ("169.254.169.254", "metadata.google.internal")
_CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true for a public bucket",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or GOOGLE_SKIP_SIGNATURE=true for a public bucket",
}


def open_store(url: str) -> Any:
    """Return the store of the package ``obstore`` for a prefix of a bucket.

    Args:
        url: of the prefix.

    Raises:
        RepaError: the package is not installed, the address is none, or an environment variable that leads
            there is malformed.
    """
    try:
        from obstore.exceptions import BaseError
        from obstore.store import from_url
    except ImportError as error:
        raise RepaError(
            f"{url} is in a bucket, which needs the package obstore",
            "install it with `pip install 'repa[remote]'`",
        ) from error
    check_environment(url)
    try:
        return from_url(url, retry_config={"max_retries": _RETRIES, "backoff": _BACKOFF})
    except (BaseError, ValueError) as error:
        raise RepaError(
            f"{url} cannot be reached: {_one_line(error)}", "look at the address and the credentials"
        ) from error


@contextmanager
def errors_of_the_system(url: str, name: str) -> Iterator[None]:
    """Turn what goes wrong with a store into an error of the operating system, as of a file.

    Args:
        url: of the store's prefix.
        name: of the object that is asked for.

    Raises:
        FileNotFoundError: there is none.
        OSError: anything else that the store says.
    """
    from obstore.exceptions import BaseError

    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"{url}/{name}") from error
    except (BaseError, OSError) as error:
        what = _one_line(error)
        if any(server in what for server in _METADATA_SERVERS):
            what = f"no credentials: {_CREDENTIALS[url[:2]]}"
        raise OSError(errno.ECONNABORTED, what, f"{url}/{name}") from error
    except BaseException as error:
        # pyo3's own class cannot be imported, and is no Exception
        if type(error).__name__ != "PanicException":
            raise
        raise OSError(errno.ECONNABORTED, _one_line(error), f"{url}/{name}") from error


def _one_line(error: BaseException) -> str:
    # the crate appends the whole chain of causes as it is in memory
    return " ".join(str(error).partition("Debug source")[0].split())[:300]
