"""Weights read from a file or the hub, checked against the model and hashed, or drawn from a fixed seed."""

from __future__ import annotations

import hashlib
import pickle
import warnings
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ... import __version__
from ...data.errors import RepaError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

REPA = "repa"
"""Its own name among the libraries that computed a source. See `tolerances` for what is told by it."""

INITIALISATION_SEED = 0
HUB_TIMEOUT_SECONDS = 10
NESTING = ("state_dict", "model")  # names under which published checkpoints keep their tensors
NAMES_IN_MESSAGE = 3


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint, on the CPU.

    Args:
        path: ``.safetensors``, or a file of `torch.save` that holds nothing but tensors and plain values;
            nesting under ``state_dict`` or ``model`` is undone.

    Raises:
        RepaError: no such file, or not such a file.
    """
    if not path.is_file():
        raise RepaError(
            f"weights file {path} {'is a folder' if path.is_dir() else 'does not exist'}", "give a file"
        )
    try:
        values = _read(path)
    except OSError as error:
        raise RepaError(
            f"weights file {path} cannot be read ({error.strerror or error})", "give one that can"
        ) from error
    # the readers of broken files raise many kinds: SafetensorError, UnpicklingError, RuntimeError, …
    except Exception as error:
        # torch's own words are a bare code, or recommend reading it unsafely
        pickled = isinstance(error, pickle.UnpicklingError | LookupError)
        reason = "it holds other objects, or is damaged" if pickled else one_line(error)
        raise RepaError(
            f"weights file {path} is neither safetensors nor a tensors-only PyTorch file ({reason})",
            "save its state dict as safetensors, or bring the file again if the download broke",
        ) from error
    while isinstance(values, dict):
        inner = next((values[name] for name in NESTING if isinstance(values.get(name), dict)), None)
        if inner is None:
            break
        values = inner
    if not isinstance(values, dict) or not values:
        raise RepaError(f"weights file {path} holds no state dict", "give a file of named tensors")
    strangers = [name for name, value in values.items() if not isinstance(value, Tensor)]
    if strangers:
        raise RepaError(
            f"weights file {path} holds more than tensors ({some(strangers)})", "save the state dict alone"
        )
    return values


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of TorchScript archives, which then raise
        return torch.load(path, map_location="cpu", weights_only=True)


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], *, what: str, remedy: str) -> None:
    """Load tensors whose names and shapes must be the model's exactly.

    Args:
        model: takes the values; float dtypes are converted to its own.
        state: the tensors.
        what: file and model, begins the error.
        remedy: what to bring instead, ends the error.

    Raises:
        RepaError: says which tensors are missing, unexpected or of another shape.
    """
    expected = model.state_dict()
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    reshaped = [
        f"{name} {list(state[name].shape)} for {list(expected[name].shape)}"
        for name in expected
        if name in state and state[name].shape != expected[name].shape
    ]
    differences = [
        f"{len(names)} {kind} ({some(names)})"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
        if names
    ]
    if differences:
        raise RepaError(f"{what}: of its tensors are {', '.join(differences)}", f"{remedy}")
    model.load_state_dict(dict(state))


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """Hash a state dict, whatever file held it.

    For each tensor in the order of names: a line ``name⇥dtype⇥shape``, then its bytes, row-major.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        shape = ",".join(map(str, tensor.shape))
        digest.update(f"{name}\t{str(tensor.dtype).removeprefix('torch.')}\t{shape}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def drawn_weights(seed: int = INITIALISATION_SEED) -> Iterator[None]:
    """Give a model built on the CPU in here the same weights every time. The caller's RNG is untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed CUDA too
        yield


def hub_file(repository: str, filenames: Sequence[str], *, remedy: str) -> Path:
    """Find the first of some files that a repository of the Hugging Face hub has. The local copy wins.

    Asks once whether the hub answers at all before anything is tried: its client would retry every file for
    half a minute, with a warning each time.

    Args:
        repository: for example ``timm/vit_base_patch14_dinov2.lvd142m``.
        filenames: alternatives, best first; may have a folder before a slash.
        remedy: what to do instead, ends the error.

    Raises:
        RepaError: neither here nor reachable.
    """
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    for filename in filenames:
        try:
            return Path(huggingface_hub.hf_hub_download(repository, filename, local_files_only=True))
        except LocalEntryNotFoundError:
            continue
        except ValueError as error:  # HFValidationError: not of the form owner/name
            raise RepaError(
                f"{repository!r} is neither a folder nor a name on the hub", f"{remedy}"
            ) from error
    endpoint = huggingface_hub.constants.ENDPOINT
    reason = f"{repository} has none of {', '.join(filenames)}"
    try:
        huggingface_hub.get_session().head(endpoint, timeout=HUB_TIMEOUT_SECONDS)
        for filename in filenames:
            try:
                return Path(huggingface_hub.hf_hub_download(repository, filename))
            except EntryNotFoundError:
                continue
    # of the HTTP client (which one depends on the hub's version), of TLS, of the hub: absent, gated, …
    except Exception as error:
        reason = f"{endpoint}/{repository}: {one_line(error)}"
    raise RepaError(f"weights are neither here nor on the hub ({reason})", f"{remedy}")


def library_versions(*names: str) -> dict[str, str]:
    """Return name → installed version, of repa itself too."""
    return {REPA: __version__, **{name: version(name) for name in names}}


def some(names: Sequence[str]) -> str:
    """Name the first few of many names."""
    return ", ".join(names[:NAMES_IN_MESSAGE]) + (", …" if len(names) > NAMES_IN_MESSAGE else "")


def one_line(error: BaseException) -> str:
    """Return the first sentence or line of an exception's message, at most 160 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 160 else f"{text[:159]}…"
