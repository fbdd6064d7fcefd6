"""Lines of tegrastats from two families of boards."""

import pytest
from edge_compress.devices.tensorrt import tegrastats

AGX = (
    "11-21-2025 08:49:48 RAM 13983/62780MB (lfb 424x4MB) SWAP 126/31390MB (cached 0MB) CPU [90%@2201,off,3%@729] "
    "EMC_FREQ 1%@2133 GR3D_FREQ 14%@[407,407] VIC_FREQ 115 NVDLA0_FREQ @1600 APE 174 CV0@73.625C CPU@77.281C GPU@69.125C "
    "tj@77.281C VDD_GPU_SOC 3150mW/2971mW VDD_CPU_CV 14312mW/12415mW VIN_SYS_5V0 4968mW/5048mW VDDQ_VDD2_1V8AO 1091mW/1091mW"
)
NANO = (
    "RAM 2000/7620MB (lfb 4x4MB) CPU [5%@729,off] GR3D_FREQ 26% cpu@46.41C gpu@46.03C tj@46.41C "
    "VDD_IN 4900mW/5000mW VDD_CPU_GPU_CV 924mW/939mW VDD_SOC 1500mW/1600mW"
)


def test_the_instant_value_of_every_rail_is_read_not_the_mean():
    assert tegrastats.rails_w(AGX) == {"VDD_GPU_SOC": 3.15, "VDD_CPU_CV": 14.312, "VIN_SYS_5V0": 4.968, "VDDQ_VDD2_1V8AO": 1.091}


def test_the_modules_input_is_its_power_and_without_one_the_sum_of_rails():
    nano = tegrastats.power([NANO, NANO.replace("VDD_IN 4900mW", "VDD_IN 5900mW")])
    assert (nano.watts, nano.of, nano.readings) == (pytest.approx(5.4), "VDD_IN", 2)
    agx = tegrastats.power([AGX])
    assert agx.watts == pytest.approx(23.521)
    assert "VDD_CPU_CV" in agx.of
    assert str(nano) == "5.40 W (VDD_IN, 2 readings)"


def test_where_no_rail_may_be_read_there_is_no_power():
    without = NANO.partition(" VDD_IN")[0]
    assert tegrastats.rails_w(without) == {}
    assert tegrastats.power([without, "tegrastats: permission denied", ""]) is None
    assert tegrastats.rails_w("total nonsense VDD_IN 1mW") == {}


def test_a_rail_of_thousands_of_digits_is_not_read():
    assert tegrastats.rails_w(NANO.replace("VDD_IN 4900mW", f"VDD_IN {'9' * 5000}mW")).keys() == {"VDD_CPU_GPU_CV", "VDD_SOC"}
