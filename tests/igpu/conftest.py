"""What runs on a GPU that OpenVINO sees: everything in this folder, skipped where there is none.

Compiling is what takes the time; what was compiled is kept in build/igpu_cache for the next run.
"""

from pathlib import Path

import openvino as ov
import pytest

from tests.conftest import SHARED

KEPT = Path(__file__).parents[2] / "build" / "igpu_cache"
QUICK = "[qwen2]"  # the golden set that CI takes
MAKE_ONE = "OpenVINO sees no GPU here" + (
    ", ../shared/igpu/setup build/igpu makes one:  CL_CONFIG_CPU_TARGET_ARCH=core-avx2 build/igpu/run make test-igpu"
    if (SHARED / "igpu").exists()
    else ""
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    there_is_one = bool(here) and any(name.startswith("GPU") for name in ov.Core().available_devices)
    for item in here:
        item.add_marker("igpu")
        if item.name.endswith(QUICK):
            item.add_marker("quick")
        if not there_is_one:
            item.add_marker(pytest.mark.skip(reason=MAKE_ONE))
