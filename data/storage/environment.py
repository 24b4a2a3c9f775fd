"""The environment variables that lead to a bucket, looked at before the first request.

The crate behind obstore takes them as they are, and panics with its own backtrace over an endpoint that is no
address, or a key that no HTTP header can hold.
"""

from __future__ import annotations

import ipaddress
import os
import re
from typing import TYPE_CHECKING

from ..errors import RepaError

if TYPE_CHECKING:
    from collections.abc import Mapping

# variables whose values go into headers as they are
_PLAIN = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_REGIONS = ("AWS_REGION", "AWS_DEFAULT_REGION")
_ENDPOINT = re.compile(
    r"(?P<scheme>https?)://(?P<host>[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\])(?::(?P<port>[0-9]{1,5}))?(?:/[A-Za-z0-9._~/-]*)?"
)
_LABEL = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]*[A-Za-z0-9])?")
_ALLOW_HTTP = "AWS_ALLOW_HTTP"
_TRUE = ("1", "true", "on", "yes", "y")  # as the crate reads a switch, in any case


def check_environment(url: str, environment: Mapping[str, str] = os.environ) -> None:
    """Refuse environment variables that no request could be made with.

    Args:
        url: address in a bucket; those of ``gs://…`` are led to by a file alone.
        environment: name → value.

    Raises:
        RepaError: names the variable, and what to set.
    """
    if not url.startswith("s3://"):
        return
    for name in (*_PLAIN, *_ENDPOINTS, *_REGIONS):
        value = environment.get(name, "")
        if not value:
            continue
        if not (value.isascii() and value.isprintable()):
            # a secret may stand in it: the value itself is not shown
            raise RepaError(
                f"the environment variable {name} holds a line break or another character that no HTTP "
                f"header can hold, so {url} cannot be reached",
                f"set {name} again, without quotes or a line break at its end",
                field=name,
            )
        if name in _ENDPOINTS:
            _check_endpoint(name, value, environment.get(_ALLOW_HTTP, ""))
        if name in _REGIONS and not value.replace("-", "").isalnum():
            raise RepaError(
                f"the environment variable {name} is {value!r}, which is no region",
                "set it to letters, digits and hyphens, as us-east-1",
                field=name,
            )


def _check_endpoint(name: str, value: str, allow_http: str) -> None:
    match = _ENDPOINT.fullmatch(value)
    if match is None or not _is_host(match["host"]) or not 0 < int(match["port"] or 1) < 1 << 16:
        raise RepaError(
            f"the environment variable {name} is {value!r}, which is no address of a server",
            f"set it with scheme and host, as {name}=https://minio.example.org:9000",
            field=name,
        )
    if match["scheme"] == "http" and allow_http.lower() not in _TRUE:
        raise RepaError(
            f"the environment variable {name} is {value}, and requests without TLS are not allowed",
            f"set {_ALLOW_HTTP}=true if the server is to be reached over plain http",
            field=_ALLOW_HTTP,
        )


def _is_host(host: str) -> bool:
    """Tell whether a text is the name or number of a machine."""
    labels = host.removesuffix(".").split(".")
    if host.startswith("[") or labels[-1].isdigit():
        # a last part in digits makes it an IPv4 address, wherever URLs are read
        try:
            ipaddress.ip_address(host.strip("[]"))
        except ValueError:
            return False
        return True
    return all(map(_LABEL.fullmatch, labels))
