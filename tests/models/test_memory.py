"""Which device and number type a word means."""

from __future__ import annotations

import pytest
import torch
import torch.utils._triton
from torch._inductor.exc import InvalidCxxCompiler

from sdlab.errors import SdlabError
from sdlab.models.memory import Threads, check_compiler, pick_device, pick_dtype, pick_threads


def cards(monkeypatch: pytest.MonkeyPatch, count: int, *, bf16: bool = True) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.parametrize(
    ("word", "count", "device"),
    [
        ("auto", 0, "cpu"),
        ("auto", 1, "cuda:0"),
        ("cpu", 1, "cpu"),
        ("CPU ", 0, "cpu"),
        ("cuda", 2, "cuda:0"),
        ("cuda:1", 2, "cuda:1"),
    ],
)
def test_device_words(monkeypatch: pytest.MonkeyPatch, word: str, count: int, device: str) -> None:
    cards(monkeypatch, count)
    assert pick_device(word) == torch.device(device)


@pytest.mark.parametrize(
    ("word", "count", "said"),
    [
        ("cuda", 0, "no CUDA card"),
        ("cuda:1", 1, "no cuda:1"),
        ("cuda:x", 1, "unknown device 'cuda:x'"),
        ("gpu", 1, "unknown device 'gpu'"),
        ("", 1, "unknown device ''"),
        ("mps", 0, "no mps"),
    ],
)
def test_devices_that_are_not_there_are_one_line(
    monkeypatch: pytest.MonkeyPatch, word: str, count: int, said: str
) -> None:
    cards(monkeypatch, count)
    with pytest.raises(SdlabError, match=said) as raised:
        pick_device(word)
    assert "\n" not in str(raised.value) and str(raised.value).startswith("--device")


@pytest.mark.parametrize(
    ("word", "device", "bf16", "dtype"),
    [
        ("auto", "cpu", True, torch.float32),
        ("auto", "cuda", True, torch.bfloat16),
        ("auto", "cuda", False, torch.float16),
        ("fp32", "cuda", True, torch.float32),
        ("float16", "cpu", True, torch.float16),
        ("BF16", "cpu", True, torch.bfloat16),
    ],
)
def test_dtype_words(
    monkeypatch: pytest.MonkeyPatch, word: str, device: str, bf16: bool, dtype: torch.dtype
) -> None:
    cards(monkeypatch, 1, bf16=bf16)
    assert pick_dtype(word, torch.device(device)) == dtype


def test_unknown_dtype_is_refused() -> None:
    with pytest.raises(SdlabError, match="unknown number type 'int8'"):
        pick_dtype("int8", torch.device("cpu"))


@pytest.mark.parametrize(
    ("device", "dtype", "num_parameters", "asked", "cores", "threads"),
    [
        ("cpu", torch.float32, 4_000_000, None, 2, Threads(1, 2)),
        ("cpu", torch.float32, 4_000_000, None, 64, Threads(1, 8)),
        ("cpu", torch.float32, 4_000_000, None, 1, Threads(1, 1)),
        ("cpu", torch.float32, 860_000_000, None, 4, Threads(4, 1)),
        ("cpu", torch.bfloat16, 4_000_000, None, 4, Threads(4, 1)),
        ("cuda", torch.float32, 4_000_000, None, 4, Threads(4, 1)),
        ("cpu", torch.float32, 4_000_000, 3, 2, Threads(3, 1)),
        ("cpu", torch.float32, 860_000_000, 3, 2, Threads(3, 1)),
    ],
)
def test_a_small_model_on_a_cpu_takes_one_thread_a_picture(
    device: str, dtype: torch.dtype, num_parameters: int, asked: int | None, cores: int, threads: Threads
) -> None:
    found = pick_threads(
        torch.device(device), dtype, num_parameters=num_parameters, asked=asked, num_cores=cores
    )
    assert found == threads


def test_a_missing_compiler_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder

    def none() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(SdlabError, match=r"needs a C\+\+ compiler") as raised:
        check_compiler(torch.device("cpu"))
    assert "\n" not in str(raised.value)
    monkeypatch.setattr(torch.utils._triton, "has_triton", lambda: False)
    with pytest.raises(SdlabError, match="needs Triton"):
        check_compiler(torch.device("cuda"))
