"""Which device and dtype are chosen, and what the user is told."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from freres_cli.devices import Device, choose_device, choose_dtype, memory_errors_as, set_seed
from freres_cli.errors import ResourceError, UsageError

CPU = Device("cpu", "CPU", "sdpa", "")
CUDA = Device("cuda:0", "a GPU", "sdpa", "")
GIB = 2**30


@pytest.fixture
def num_cuda(monkeypatch):
    def pretend(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        properties = type("Properties", (), {"name": "a GPU", "total_memory": 24 * GIB, "major": 9, "minor": 0})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _ordinal: properties)

    return pretend


@pytest.mark.parametrize("requested", [None, "auto"])
def test_auto_takes_the_cpu_only_with_a_word(num_cuda, requested):
    num_cuda(0)
    device = choose_device(requested)
    assert device.name == "cpu"
    assert "auto: torch sees no CUDA device" in device.note


def test_auto_takes_cuda_if_available(num_cuda):
    num_cuda(1)
    device = choose_device("auto")
    assert (device.name, device.is_cuda) == ("cuda:0", True)
    assert device.note == "device cuda:0 (a GPU, 24 GiB): auto: CUDA is available"


def test_each_process_of_a_machine_takes_its_own(num_cuda, monkeypatch):
    num_cuda(4)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert [choose_device(name).name for name in ("auto", "cuda", "cuda:1", "cpu")] == [
        "cuda:2",
        "cuda:2",
        "cuda:1",
        "cpu",
    ]


def test_a_process_that_sees_one_device_takes_it_whatever_its_rank(num_cuda, monkeypatch):
    """Launchers that set CUDA_VISIBLE_DEVICES for each process number the processes all the same."""
    num_cuda(1)
    monkeypatch.setenv("LOCAL_RANK", "3")
    device = choose_device("auto")
    assert device.name == "cuda:0" and device.note.endswith("available, the only one that LOCAL_RANK 3 sees")
    assert choose_device("cuda").name == "cuda:0" and choose_device("cuda:0").note.endswith("asked for")
    num_cuda(2)
    with pytest.raises(ResourceError, match="cuda is not available: torch sees 2 CUDA devices, and LOCAL_RANK is 3"):
        choose_device("cuda")


@pytest.mark.parametrize("text", ["one", "-1", "1.0", "x" * 1000])
def test_a_rank_that_is_no_number_is_named_where_it_counts(num_cuda, monkeypatch, text):
    num_cuda(2)
    monkeypatch.setenv("LOCAL_RANK", text)
    for name in ("auto", "cuda"):
        with pytest.raises(UsageError, match=r"^LOCAL_RANK: expected a whole number, got '.{1,40}'$"):
            choose_device(name)
    assert [choose_device(name).name for name in ("cpu", "cuda:1")] == ["cpu", "cuda:1"]
    monkeypatch.setenv("LOCAL_RANK", "")
    assert choose_device("auto").name == "cuda:0"


def test_what_is_asked_for_is_taken(num_cuda):
    num_cuda(2)
    assert choose_device("cpu").note.endswith("asked for")
    assert choose_device("cuda").name == "cuda:0"
    assert choose_device("cuda:1").name == "cuda:1"


@pytest.mark.parametrize(
    ("requested", "count", "seen"), [("cuda", 0, "no"), ("cuda:0", 0, "no"), ("cuda:1", 1, "1"), ("cuda:2", 2, "2")]
)
def test_a_cuda_device_that_is_not_there(num_cuda, requested, count, seen):
    num_cuda(count)
    with pytest.raises(ResourceError, match=f"{requested} is not available: torch sees {seen} CUDA device"):
        choose_device(requested)


@pytest.mark.parametrize("requested", ["gpu", "cuda:", "cuda:x", "cpu:0", "mps"])
def test_other_names_are_refused(requested):
    with pytest.raises(UsageError, match="expected auto, cpu, cuda or cuda:N"):
        choose_device(requested)


@pytest.mark.parametrize(
    ("requested", "device", "weight_bytes", "expected"),
    [
        (None, CPU, GIB - 1, torch.float32),
        ("auto", CPU, GIB, torch.bfloat16),
        ("auto", CUDA, 1, torch.bfloat16),
        ("float16", CPU, 1, torch.float16),
        ("float32", CUDA, 10 * GIB, torch.float32),
    ],
)
def test_dtype(requested, device, weight_bytes, expected):
    dtype, note = choose_dtype(requested, device, torch.bfloat16, weight_bytes)
    assert dtype == expected
    assert str(expected).removeprefix("torch.") in note


@pytest.mark.parametrize(("capability", "is_slow"), [((7, 0), True), ((7, 5), True), ((8, 0), False), ((10, 0), False)])
def test_bfloat16_on_a_gpu_that_emulates_it_is_kept_with_a_word(num_cuda, monkeypatch, capability, is_slow):
    """float16 in its place would overflow in some models, with answers that mean nothing."""
    num_cuda(1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    dtype, note = choose_dtype(None, CUDA, torch.bfloat16, 1)
    told = f"slow on a GPU of compute capability {capability[0]}.{capability[1]}"
    assert dtype == torch.bfloat16 and (told in note) == is_slow
    for name, stored in (("bfloat16", torch.bfloat16), (None, torch.float16)):
        assert "slow" not in choose_dtype(name, CUDA, stored, 1)[1]
    assert "slow" not in choose_dtype(None, CPU, torch.bfloat16, 2 * GIB)[1]


def test_an_unknown_dtype_is_refused():
    with pytest.raises(UsageError, match="expected one of auto, float32, bfloat16, float16, got int8"):
        choose_dtype("int8", CPU, torch.float32, 1)


def test_other_failures_pass():
    with pytest.raises(RuntimeError, match="shapes"), memory_errors_as("the thing", "a hint"):
        raise RuntimeError("shapes do not match")


def test_a_huge_allocation_is_a_resource_error():
    with pytest.raises(ResourceError), memory_errors_as("the thing", "a hint"):
        torch.empty(2**60, dtype=torch.uint8)


def test_set_seed():
    set_seed(3)
    first = torch.rand(2)
    set_seed(3)
    assert torch.equal(torch.rand(2), first)


HEAP = """
import sys
from freres_cli.devices import return_large_memory

def resident_bytes():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

if sys.argv[1] == "return":
    return_large_memory()
for _ in range(3):
    bytes(30 << 20)  # freed at once; by default glibc now keeps pieces of up to this size
before = resident_bytes()
large, small = [], []
for _ in range(100):
    large.append(b"x" * (2 << 20))
    small.append(b"x" * 1024)
held = resident_bytes() - before
del large[:-1]
print((resident_bytes() - before) / held)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's heap")
def test_freed_memory_goes_back_to_the_system_on_request():
    def share_kept(how):
        run = subprocess.run([sys.executable, "-c", HEAP, how], capture_output=True, text=True, check=True)
        return float(run.stdout)

    assert share_kept("keep") > 0.9 and share_kept("return") < 0.1
