"""python -m pytest tests/runtime/parts/test_gpu_access.py

Why a GPU that is in the machine is not seen, on folders that imitate such machines; and what --device auto takes.
"""

import json
import os
import re
import sys

import pytest

from runtime.__main__ import main
from runtime.errors import DeviceError
from runtime.folder.settings import keep, machine
from runtime.parts import device as devices
from runtime.parts.device import check_device, choose_devices
from runtime.parts.gpu_access import PACKAGES, why_no_gpu
from tests.runtime.parts.test_device import LAPTOP, StandIn

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="imitates files of Linux")


@pytest.fixture
def machine_with(tmp_path):
    """A root folder with these files, and a render node that is open to its group, which nobody is in."""

    def make(files, node=True):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        if node:
            (tmp_path / "dev/dri").mkdir(parents=True)
            (tmp_path / "dev/dri/renderD128").touch(0o660)
            (tmp_path / "dev/dri/renderD128").chmod(0o660)
        return tmp_path

    return make


SEEN = {"sys/class/drm/card0/device/vendor": "0x8086\n"}
DRIVER = {"etc/OpenCL/vendors/intel.icd": "libigdrcl.so"}
GROUP = os.getgid() if sys.platform == "linux" else 0
NAMED = {"etc/group": f"root:x:{GROUP + 1}:\nrender:x:{GROUP}:somebody\n"}


@pytest.mark.parametrize("files", [{}, {"sys/class/drm/card0/device/vendor": "0x10de\n"}], ids=["no GPU", "another maker's"])
def test_nothing_is_said_of_a_machine_without_one(machine_with, files):
    assert why_no_gpu(machine_with(files), []) == []


def test_a_gpu_without_a_kernel_driver(machine_with):
    bus = {"sys/bus/pci/devices/0000:00:02.0/vendor": "0x8086", "sys/bus/pci/devices/0000:00:02.0/class": "0x030000"}
    assert why_no_gpu(machine_with(bus), []) == [
        "the kernel sees an Intel GPU and has no driver for it: a newer kernel has (i915, or xe since 6.8)"
    ]
    assert why_no_gpu(machine_with({"sys/bus/pci/devices/0000:00:02.0/class": "0x020000"}, node=False), []) == []


def test_a_container_without_the_device_files(machine_with):
    (said,) = why_no_gpu(machine_with(SEEN | DRIVER, node=False), [])
    assert said.endswith("/dev/dri is not here: in a container, start it with  --device /dev/dri")


def test_a_group_that_the_person_is_not_in(machine_with):
    root = machine_with(SEEN | DRIVER | NAMED)
    assert why_no_gpu(root, [GROUP + 1]) == [
        "/dev/dri/renderD128 is for the group render: sudo usermod -aG render $USER, then log in again"
    ]
    assert why_no_gpu(root, [GROUP]) == []


@pytest.mark.parametrize(
    ("told", "package"),
    [
        ("ID=ubuntu\nID_LIKE=debian\n", PACKAGES["ubuntu"]),
        ('ID="linuxmint"\nID_LIKE="ubuntu debian"\n', PACKAGES["ubuntu"]),
        ("ID=fedora\n", PACKAGES["fedora"]),
        ('ID="opensuse-leap"\nID_LIKE="suse opensuse"\n', PACKAGES["suse"]),
        ("ID=arch\n", PACKAGES["arch"]),
        ("ID=nixos\n", "the package intel-opencl-icd, or intel-compute-runtime"),
    ],
)
def test_a_package_that_is_missing_by_distribution(machine_with, told, package):
    root = machine_with(SEEN | {"etc/os-release": told})
    assert why_no_gpu(root, [GROUP]) == [f"the OpenCL driver for Intel GPUs is not installed: {package}"]


def test_who_asks_for_a_gpu_that_is_not_seen_is_told_why(monkeypatch):
    monkeypatch.setattr(devices, "why_no_gpu", lambda: ["the driver is missing: apt install it"])
    with pytest.raises(DeviceError, match=r"there is no device GPU here; there are CPU; the driver is missing: apt install it"):
        check_device(StandIn(["CPU"]), "GPU")
    with pytest.raises(DeviceError, match=r"there is no device GPU.1 here; there are CPU, GPU$"):
        check_device(LAPTOP, "GPU.1")


@pytest.mark.parametrize(
    ("core", "language", "vision"),
    [
        (StandIn(["CPU"]), "CPU", "CPU"),
        (LAPTOP, "CPU", "GPU"),
        (StandIn(["CPU", "GPU"], gpu_able=("FP16", "GPU_HW_MATMUL")), "GPU", "GPU"),
        (StandIn(["CPU", "GPU"], gpu_type="Type.DISCRETE"), "GPU", "GPU"),
        (StandIn(["CPU", "GPU.0", "GPU.1"]), "CPU", "GPU.0"),
    ],
    ids=["no GPU", "integrated", "with matrix units", "Arc", "two"],
)
def test_auto_goes_by_the_kind_of_gpu_and_says_that_it_is_a_rule(core, language, vision):
    chosen = choose_devices(core)
    assert (chosen.language, chosen.vision) == (language, vision)
    assert ("--device auto measures" in str(chosen)) == (len(core.available_devices) > 1)


def test_auto_takes_what_tune_found_on_this_machine(tmp_path):
    found = {"machine": machine(LAPTOP, "auto"), "device": "GPU", "vision_device": "CPU"}
    keep(tmp_path, "auto", found)
    chosen = choose_devices(LAPTOP, found)
    assert str(chosen) == "language on GPU, vision on CPU: the fastest that tune measured"
    assert machine(StandIn(["CPU"]), "auto") != found["machine"]


def test_doctor_prints_the_devices_and_what_is_missing(capsys, monkeypatch):
    monkeypatch.setattr("runtime.commands.doctor.why_no_gpu", lambda: [])
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "CPU       " in out
    assert "auto      language on " in out
    if "GPU  " not in out:
        monkeypatch.setattr("runtime.commands.doctor.why_no_gpu", lambda: ["one", "two"])
        assert main(["doctor"]) == 2
        assert capsys.readouterr().err == "error: one\n       two\n"
        assert main(["doctor", "--json"]) == 2
        assert json.loads(capsys.readouterr().out)["gpu"] == ["one", "two"]


def test_doctor_tells_of_memory_disk_and_packages(capsys, monkeypatch):
    monkeypatch.setattr("runtime.commands.doctor.why_no_gpu", lambda: [])
    monkeypatch.setattr("runtime.commands.doctor._is_here", lambda name: name not in ("nncf", "gradio"))
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "convert   lacks nncf: pip install 'internvl-openvino[convert]'" in out
    assert "demo      lacks gradio: " in out
    assert "serve     installed" in out
    assert re.search(r"^memory    [\d.]+ GB, [\d.]+ GB available$", out, re.M)
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["memory"] >= found["available_memory"] > 0
    assert found["missing"]["convert"] == ["nncf"]
