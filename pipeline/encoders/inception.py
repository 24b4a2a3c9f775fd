"""The Inception network of FID, which torch-fidelity has with the resize of its TensorFlow graph.

torch-fidelity is asked for the network alone: its own loader would unpickle a file without restraint.
"""

from __future__ import annotations

import io
import threading
from typing import TYPE_CHECKING, Any, Final

import torch

from ...data.errors import RepaError
from .precision import forward_pass
from .weights import one_line, read_state_dict, weights_sha256

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

NAME: Final = "inception"
FLAG: Final = "--inception"
_EXTRA: Final = "pip install -e '.[evaluate]'"
_POOL, _LOGITS = "2048", "logits_unbiased"
_SPATIAL_CHANNELS: Final = 7
"""Channels of ``mixed_6/conv`` that sFID takes (openai/guided-diffusion, evaluator.py)."""
_SPATIAL_SIDE: Final = 17
_HASH_PREFIX_LENGTH: Final = 8


class Inception:
    """The Inception network of 2015, with its pooled features, its logits and what sFID is of.

    Args:
        weights: file of the state dict that torch-fidelity has; None takes the hub's or its local copy.
        device: where it computes.
        random_weights: say that the file's weights are drawn; they are then called so in every report.

    Attributes:
        name: ``inception``.
        weights_sha256: of its weights.
        random_weights: whether they were drawn.
        widths: ``pool`` 2,048, ``spatial`` 2,023, ``logits`` 1,008.
        device: where it computes.

    Raises:
        RepaError: torch-fidelity is not installed, or the weights cannot be had or are another network's.
    """

    name = NAME
    widths: Mapping[str, int] = {
        "pool": 2048,
        "spatial": _SPATIAL_CHANNELS * _SPATIAL_SIDE**2,
        "logits": 1008,
    }

    def __init__(
        self, weights: Path | None, *, device: str | torch.device = "cpu", random_weights: bool = False
    ) -> None:
        module = _torch_fidelity()
        state = read_state_dict(_hub_file(module) if weights is None else weights)
        self.weights_sha256 = weights_sha256(state)
        self.random_weights = random_weights
        self.device = torch.device(device)
        self._network = _build(module, state, weights).to(self.device)
        self._spatial = threading.local()
        # TensorFlow's mixed_6/conv: the first of the branches, after its ReLU
        self._network.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Return the features of a batch.

        Args:
            images: uint8 ``[B, 3, R, R]``, on the device.

        Returns:
            ``pool`` ``[B, 2048]``, ``logits`` ``[B, 1008]`` without bias and ``spatial`` ``[B, 2023]``, the
            17×17 grid with its 7 channels last; float32.
        """
        with torch.inference_mode(), forward_pass("float32", self.device):
            pool, logits = self._network(images)
        # channels last, as TensorFlow has them
        spatial = self._spatial.values[:, :_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return {"pool": pool, "spatial": spatial, "logits": logits}

    def _keep(self, module: Any, inputs: Any, output: Tensor) -> None:
        # by thread: several batches may be computed at once
        self._spatial.values = output


def _torch_fidelity() -> Any:
    try:
        from torch_fidelity import feature_extractor_inceptionv3
    except ImportError as error:
        raise RepaError(
            f"the Inception network needs torch-fidelity, which is not installed ({error})",
            f"{_EXTRA}, or ask for fd/<encoder> against a cache",
            field="--metrics",
        ) from error
    return feature_extractor_inceptionv3


def _build(module: Any, state: Mapping[str, Tensor], weights: Path | None) -> Any:
    # its constructor loads a file; this one holds nothing but tensors that were read safely
    file = io.BytesIO()
    torch.save(dict(state), file)
    file.seek(0)
    try:
        return module.FeatureExtractorInceptionV3(NAME, [_POOL, _LOGITS], feature_extractor_weights_path=file)
    except RuntimeError as error:
        where = weights or "the file of the hub"
        raise RepaError(
            f"{where} does not hold the Inception network of FID ({one_line(error)})",
            "give the one that torch-fidelity publishes; torchvision's is another network",
            field=FLAG,
        ) from error


def _hub_file(module: Any) -> Path:
    from pathlib import Path
    from urllib.parse import urlparse

    url: str = module.URL_INCEPTION_V3
    file = Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(url).path).name)
    if file.exists():
        return file
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # the published name ends in the beginning of the file's sha256
        torch.hub.download_url_to_file(url, str(file), hash_prefix=file.stem[-_HASH_PREFIX_LENGTH:])
    except (OSError, RuntimeError) as error:
        raise RepaError(
            f"the weights of Inception are neither here nor to be had from {url} ({one_line(error)})",
            f"bring that file and give {FLAG} FILE, or ask for fd/<encoder> against a cache",
            field=FLAG,
        ) from error
    return file
