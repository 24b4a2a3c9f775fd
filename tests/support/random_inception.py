"""The Inception network of FID with RANDOM weights, of which no figure means anything."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


def write_random_inception(file: Path) -> Path:
    """Draw weights and write them in the form of torch-fidelity's own file."""
    inception = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        patch.setattr(inception.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        patch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: {})
        torch.manual_seed(0)
        state = inception.FeatureExtractorInceptionV3("x", ["2048"]).state_dict()
    torch.save(state, file)
    return file
