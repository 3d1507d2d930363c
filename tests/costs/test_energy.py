"""Energy counters: RAPL in a folder like Linux's, NVML behind a stand-in for its module."""

import itertools
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.costs import energy
from stages.costs.energy import RaplMeter, measure_joules, open_meter, open_rapl
from stages.costs.params import CostsParams
from stages.costs.report import write_report
from stages.costs.timing import measure_costs
from stages.protocol.costs import CostsRecord, read_costs
from stages.storage.files import read_json

CPU, RANGE = torch.device("cpu"), 262_143_328_850
"""The range of a counter, as processors have it."""


@pytest.fixture
def zone(tmp_path):
    """Write a zone of powercap: its name and its counter in microjoules."""

    def write(folder, name, counter, span=RANGE):
        (tmp_path / folder).mkdir(exist_ok=True)
        for key, value in {"name": name, "energy_uj": counter, "max_energy_range_uj": span}.items():
            (tmp_path / folder / key).write_text(f"{value}\n")
        return tmp_path / folder

    return write


def test_the_energy_is_that_of_all_packages_and_of_nothing_twice(zone, tmp_path):
    """Cores are part of a package, and psys spans them; both have counters of their own."""
    for folder, name in {":0": "package-0", ":0:0": "core", ":1": "package-1", ":2": "psys"}.items():
        zone(f"intel-rapl{folder}", name, 1_000_000)
    zone("intel-rapl-mmio:0", "package-0", 1_000_000)
    meter = open_rapl(tmp_path)
    for folder in (":0", ":0:0", ":1", ":2"):
        zone(f"intel-rapl{folder}", "", 3_500_000)

    assert meter.source == "RAPL, 2 packages"
    assert meter.joules() == pytest.approx(2 * 2.5)


def test_a_counter_that_begins_anew_loses_nothing(zone, tmp_path):
    """It counts up to its range and goes on from nought."""
    place = zone("intel-rapl:0", "package-0", RANGE - 2_000_000)
    meter = RaplMeter([place])
    zone("intel-rapl:0", "package-0", 3_000_000)

    assert meter.joules() == pytest.approx(5.0)
    assert meter.joules() == pytest.approx(5.0)
    assert open_rapl(tmp_path).source == "RAPL, 1 package"


@settings(max_examples=30)
@given(st.lists(st.integers(0, 999), min_size=1, max_size=8), st.integers(0, 999))
def test_the_energies_of_two_windows_add_up(tmp_path_factory, steps, begin):
    """However often it is read in between and wherever it begins anew, the total is what was counted."""
    folder = tmp_path_factory.mktemp("zone")
    (folder / "max_energy_range_uj").write_text("1000")
    (folder / "energy_uj").write_text(str(begin))
    meter, readings, counter = RaplMeter([folder]), [0.0], begin
    for step in steps:
        counter = (counter + step) % 1000
        (folder / "energy_uj").write_text(str(counter))
        readings.append(meter.joules())
    windows = [after - before for before, after in itertools.pairwise(readings)]

    assert windows == pytest.approx([step * 1e-6 for step in steps])
    assert sum(windows) == pytest.approx(sum(steps) * 1e-6)


@pytest.mark.parametrize("damage", ["nothing", "no package", "one unreadable", "no number", "no range"])
def test_what_cannot_be_read_is_absent(zone, tmp_path, damage):
    """Of two packages one alone would be too little, so that there is no number at all."""
    if damage != "nothing":
        zone("intel-rapl:0", "psys" if damage == "no package" else "package-0", 1)
    if damage == "one unreadable":  # as for anyone but root; a folder fails for root, too
        (zone("intel-rapl:1", "package-1", 1) / "energy_uj").unlink()
        (tmp_path / "intel-rapl:1/energy_uj").mkdir()
    if damage == "no number":
        zone("intel-rapl:1", "package-1", "?")
    if damage == "no range":
        (tmp_path / "intel-rapl:0/max_energy_range_uj").unlink()

    assert open_meter(CPU, tmp_path / "powercap" if damage == "nothing" else tmp_path) is None


class Counter:
    """A meter of 2 joules a call, until it breaks."""

    source = "a test"

    def __init__(self, joules=2.0, breaks_after=10**6):
        self.calls, self.each, self.left = 0, joules, breaks_after

    def run(self):
        """Use energy."""
        self.calls += 1

    def joules(self):
        """Return what was used."""
        self.left -= 1
        if self.left < 0:
            raise OSError
        return self.each * self.calls


@pytest.mark.parametrize(
    ("meter", "expected"), [(Counter(), {"one": 2.0}), (Counter(joules=0), None), (Counter(breaks_after=3), None)]
)
def test_the_energy_of_a_call_is_measured_or_absent(monkeypatch, meter, expected):
    """A counter that stands still or breaks gives no number, and no 0."""
    monkeypatch.setattr(energy, "ENERGY_S", 0.001)

    assert measure_joules({"one": meter.run}, CPU, meter) == expected


@pytest.mark.parametrize("has_counter", [True, False])
def test_costs_have_energy_where_there_is_a_counter(monkeypatch, tmp_path, unet, make_unet, has_counter):
    """Joules an image and their source stand in the rows and among the metrics; without a counter neither does."""
    meter = Counter()
    monkeypatch.setattr(energy, "ENERGY_S", 0.01)
    monkeypatch.setattr("stages.costs.timing.open_meter", lambda _: meter if has_counter else None)
    monkeypatch.setattr(meter, "joules", iter(range(10**6)).__next__)
    models = {"dense": unet, "small": make_unet(block_out_channels=(8, 16))}
    rows = measure_costs(models, CostsParams(batches=(2,), repeats=6, seconds=0.1))
    record = CostsRecord(weights_sha256=dict.fromkeys(models, "a" * 64), costs=rows)
    write_report(record, tmp_path)
    metrics = read_json(tmp_path / "metrics.json")

    assert read_costs(tmp_path) == record
    assert [row.energy_source for row in rows] == (["a test"] * 2 if has_counter else [""] * 2)
    assert all((row.joules_per_image or 0) > 0 for row in rows) == has_counter
    assert {"joules_per_image" in metrics[name] for name in models} == {has_counter}


class NvmlStandIn(SimpleNamespace):
    """What is used of pynvml: 500 mJ more with each reading."""

    NVMLError = RuntimeError
    used_mj = 10_000

    def nvmlInit(self):  # noqa: N802
        """Do nothing."""

    def nvmlDeviceGetHandleByUUID(self, uuid):  # noqa: N802
        """Return the UUID."""
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):  # noqa: N802
        """Return millijoules; fails for a GPU that is too old."""
        if handle != "GPU-good":
            raise RuntimeError("not supported")
        self.used_mj += 500
        return self.used_mj


@pytest.mark.parametrize(("uuid", "is_there"), [("good", True), ("old", False)])
def test_a_gpu_is_read_by_nvml_where_that_is_installed(monkeypatch, uuid, is_there):
    """Found by its UUID, since PyTorch and NVML may number GPUs differently; without the module it is absent."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid=uuid))
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert open_meter(torch.device("cuda")) is None

    monkeypatch.setitem(sys.modules, "pynvml", NvmlStandIn())
    meter = open_meter(torch.device("cuda"))
    assert bool(meter) == is_there
    if meter:
        assert (meter.source, meter.joules(), meter.joules()) == ("NVML", 0.5, 1.0)
