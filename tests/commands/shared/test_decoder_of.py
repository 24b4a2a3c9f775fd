"""Which autoencoder decodes samples, where a model does not say whose latents it learned."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from repa.commands.shared.prepared import decoder_of
from repa.data.errors import RepaError


def test_latents_that_are_not_stable_diffusions_need_a_name() -> None:
    """They are refused before anything is loaded or fetched."""
    said: list[str] = []
    model = SimpleNamespace(tokens=None, origin="a.ckpt", autoencoder=None, latent_shape=(32, 4, 4))
    with pytest.raises(RepaError, match="32") as caught:
        decoder_of(cast("Any", model), None, "cpu", said.append)
    assert caught.value.field == "--vae"
    assert said == []
