"""Environment variables that lead to a bucket: refused before the crate sees what it would panic over."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from repa.data.errors import RepaError
from repa.data.storage.environment import check_environment

PLACE = "s3://bucket/cache"


@pytest.mark.parametrize(
    ("environment", "field"),
    [
        ({"AWS_ENDPOINT_URL": "127.0.0.1:5599"}, "AWS_ENDPOINT_URL"),
        ({"AWS_ENDPOINT_URL": "ftp://host"}, "AWS_ENDPOINT_URL"),
        ({"AWS_ENDPOINT_URL": "https://"}, "AWS_ENDPOINT_URL"),
        ({"AWS_ENDPOINT_URL": "https://host:99999"}, "AWS_ENDPOINT_URL"),
        ({"AWS_ENDPOINT_URL": "https://_127.0.0.1:1"}, "AWS_ENDPOINT_URL"),
        ({"AWS_ENDPOINT_URL": "https://127.0.0.1:1?>"}, "AWS_ENDPOINT_URL"),
        ({"AWS_ENDPOINT": "https://a b"}, "AWS_ENDPOINT"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:5599"}, "AWS_ALLOW_HTTP"),
        ({"AWS_ENDPOINT_URL": "http://host", "AWS_ALLOW_HTTP": "false"}, "AWS_ALLOW_HTTP"),
        ({"AWS_ACCESS_KEY_ID": "key\n"}, "AWS_ACCESS_KEY_ID"),
        ({"AWS_SESSION_TOKEN": "tök"}, "AWS_SESSION_TOKEN"),
        ({"AWS_REGION": "eu west"}, "AWS_REGION"),
    ],
)
def test_what_no_request_can_be_made_with(environment: dict[str, str], field: str) -> None:
    with pytest.raises(RepaError) as caught:
        check_environment(PLACE, environment)
    assert caught.value.field == field
    assert caught.value.remedy
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "endpoint",
    [
        "https://s3.example.org",
        "https://s3.example.org:9000/prefix/",
        "http://my_minio:9000",
        "http://[::1]:9000",
        "http://192.168.0.1",
    ],
)
def test_what_people_set(endpoint: str) -> None:
    check_environment(PLACE, {"AWS_ENDPOINT_URL": endpoint, "AWS_ALLOW_HTTP": "True", "AWS_REGION": "auto"})


def test_a_secret_is_not_shown() -> None:
    with pytest.raises(RepaError) as caught:
        check_environment(PLACE, {"AWS_SECRET_ACCESS_KEY": "geheim\n"})
    assert "geheim" not in str(caught.value)


def test_other_stores_are_not_asked() -> None:
    check_environment("gs://bucket/cache", {"AWS_ENDPOINT_URL": "nonsense"})


@given(st.text(max_size=30))
def test_any_endpoint_is_taken_or_refused_in_one_line(value: str) -> None:
    refusal = None
    try:
        check_environment(PLACE, {"AWS_ENDPOINT_URL": value, "AWS_ALLOW_HTTP": "1"})
    except RepaError as error:
        refusal = error
    if refusal is None:
        assert not value or value.startswith(("http://", "https://"))
    else:
        assert refusal.field == "AWS_ENDPOINT_URL"
        assert "\n" not in str(refusal)
