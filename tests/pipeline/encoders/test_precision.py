"""The arithmetic of a pass: which switches are set inside, what is put back outside, who waits for whom."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from repa.data.errors import RepaError
from repa.data.format.manifest import COMPUTE_DTYPES
from repa.pipeline.encoders import load_encoder
from repa.pipeline.encoders.precision import Float32Switches, forward_pass, require_arithmetic
from repa.pipeline.encoders.vae import Autoencoder

if TYPE_CHECKING:
    from collections.abc import Iterator

CPU = torch.device("cpu")
BACKENDS: Any = torch.backends


def switches(*before: str) -> tuple[Float32Switches, list[Any]]:
    objects = [SimpleNamespace(fp32_precision=each) for each in before]
    return Float32Switches(lambda: objects), objects


def modes(objects: list[Any]) -> list[str]:
    return [each.fp32_precision for each in objects]


@contextmanager
def cpu_switches_at(value: str) -> Iterator[list[Any]]:
    objects = [BACKENDS.mkldnn.matmul, BACKENDS.mkldnn.conv]
    for each in objects:
        each.fp32_precision = value
    try:
        yield objects
    finally:
        for each in objects:
            each.fp32_precision = "none"


def images(count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, 64, 64), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("mode", ["ieee", "tf32"])
@pytest.mark.parametrize("before", [("none", "tf32"), ("tf32", "ieee"), ("ieee", "none"), ("bf16", "tf32")])
def test_they_are_set_inside_and_put_back_outside(before: tuple[str, ...], mode: str) -> None:
    held, objects = switches(*before)
    with held.held(mode):
        # none is float32 by another name
        assert [each.replace("none", "ieee") for each in modes(objects)] == [mode] * 2
    assert modes(objects) == list(before)
    with pytest.raises(ZeroDivisionError), held.held(mode):
        raise ZeroDivisionError
    assert modes(objects) == list(before)


def test_passes_of_one_mode_share_them_and_the_last_puts_back() -> None:
    held, objects = switches("none", "tf32")
    first_left, second_in = threading.Event(), threading.Event()
    seen: list[list[str]] = []

    def second() -> None:
        with held.held("ieee"):
            second_in.set()
            assert first_left.wait(10)
            seen.append(modes(objects))

    thread = threading.Thread(target=second)
    with held.held("ieee"):
        thread.start()
        assert second_in.wait(10)
    first_left.set()
    thread.join()
    assert seen == [["none", "ieee"]]
    assert modes(objects) == ["none", "tf32"]


def test_a_pass_of_another_mode_waits() -> None:
    held, objects = switches("none", "tf32")
    seen: list[list[str]] = []

    def other() -> None:
        with held.held("tf32"):
            seen.append(modes(objects))

    thread = threading.Thread(target=other)
    with held.held("ieee"):
        thread.start()
        thread.join(0.2)
        assert (thread.is_alive(), seen, modes(objects)) == (True, [], ["none", "ieee"])
    thread.join(10)
    assert seen == [["tf32", "tf32"]]
    assert modes(objects) == ["none", "tf32"]


def test_a_pass_within_a_pass() -> None:
    held, objects = switches("none", "tf32")
    with held.held("tf32"), held.held("tf32"):
        assert modes(objects) == ["tf32", "tf32"]
    assert modes(objects) == ["none", "tf32"]
    # it would wait for itself for ever
    with held.held("tf32"), pytest.raises(RuntimeError), held.held("ieee"):
        pass
    assert modes(objects) == ["none", "tf32"]


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16", "float16"])
def test_no_lower_arithmetic_of_the_process_reaches_into_a_pass(compute_dtype: str) -> None:
    """Neither `torch.set_float32_matmul_precision("medium")` nor an autocast around it."""
    lower = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(compute_dtype, torch.float32)
    factor = torch.ones(2, 2)
    with cpu_switches_at("bf16") as objects, torch.autocast("cpu", dtype=torch.bfloat16):
        with forward_pass(compute_dtype, CPU):
            assert modes(objects) == ["ieee", "ieee"]
            assert (factor @ factor).dtype == lower
        assert modes(objects) == ["bf16", "bf16"]
        assert (factor @ factor).dtype == torch.bfloat16


def test_models_compute_float32_under_autocast_and_lower_switches() -> None:
    encoder, autoencoder = load_encoder("demo", resolution=64), Autoencoder.load("demo")
    plain = encoder.encode(images())["patch"], autoencoder.encode_moments(images())
    with cpu_switches_at("bf16"), torch.autocast("cpu", dtype=torch.bfloat16):
        inside = encoder.encode(images())["patch"], autoencoder.encode_moments(images())
    assert all(torch.equal(*pair) for pair in zip(plain, inside, strict=True))


def test_the_same_network_in_float32() -> None:
    encoder = load_encoder("demo", resolution=64, compute_dtype="bfloat16")
    exact = load_encoder("demo", resolution=64).encode(images())
    assert torch.equal(encoder.in_float32().encode(images())["patch"], exact["patch"])
    assert not torch.equal(encoder.encode(images())["patch"], exact["patch"])
    autoencoder = Autoencoder.load("demo", compute_dtype="bfloat16")
    moments = Autoencoder.load("demo").encode_moments(images())
    assert torch.equal(autoencoder.in_float32().encode_moments(images()), moments)
    assert not torch.equal(autoencoder.encode_moments(images()), moments)


def test_tf32_is_refused_on_the_cpu() -> None:
    for compute_dtype in COMPUTE_DTYPES:
        if compute_dtype != "tf32":
            require_arithmetic(compute_dtype, CPU)
    with pytest.raises(RepaError) as caught:
        require_arithmetic("tf32", CPU)
    assert caught.value.field == "--compute-dtype"
    encoder = load_encoder("demo", resolution=64, compute_dtype="tf32")
    with pytest.raises(RepaError) as caught:
        encoder.encode(images())
    assert caught.value.field == "--compute-dtype"
    with pytest.raises(RepaError):
        Autoencoder.load("demo", compute_dtype="tf32").encode_moments(images())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tf32_on_a_gpu() -> None:
    """Inside a pass products and convolutions round their factors in tf32, and in float32 they do not."""
    if not torch.cuda.is_tf32_supported():
        pytest.skip("a GPU without TF32")
    device = torch.device("cuda")
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator) for _ in range(2))
    x, w = torch.randn(4, 32, 32, 32, generator=generator), torch.randn(32, 32, 3, 3, generator=generator)
    exact = a.double() @ b.double(), torch.nn.functional.conv2d(x.double(), w.double())
    objects = [BACKENDS.cuda.matmul, BACKENDS.cudnn.conv]
    before = modes(objects)
    off = {}
    for compute_dtype in ("float32", "tf32"):
        with forward_pass(compute_dtype, device):
            found = a.to(device) @ b.to(device), torch.nn.functional.conv2d(x.to(device), w.to(device))
        off[compute_dtype] = [
            float((each.cpu().double() - truth).norm() / truth.norm())
            for each, truth in zip(found, exact, strict=True)
        ]
        assert modes(objects) == before
    assert max(off["float32"]) < 1e-5
    assert all(1e-5 < each < 2e-3 for each in off["tf32"])
