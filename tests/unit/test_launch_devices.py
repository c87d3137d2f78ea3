"""Which GPUs are a process's own: CUDA_VISIBLE_DEVICES, Slurm's variables, nvidia-smi."""

from __future__ import annotations

import pytest

from droptune.errors import ConfigurationError, LaunchError
from droptune.launch.devices import (
    assigned_devices,
    own_gpus,
    parse_indices,
    parse_nvidia_smi,
    parse_visible,
    restrict_devices,
    select_gpus,
)

UUID = "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"
MIG = "MIG-41b3359c-e721-56e5-8009-12e5797ed514"
OLD_MIG = "MIG-GPU-5c89852c-d268-c3f3-1b07-005d5ae1dc3f/7/0"

LISTING = f"""\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: {UUID})
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-5c89852c-d268-c3f3-1b07-005d5ae1dc3f)
  MIG 3g.20gb     Device  0: (UUID: {MIG})
  MIG 1g.5gb      Device  1: (UUID: {OLD_MIG})
"""


@pytest.mark.parametrize(
    ("value", "entries"),
    [
        ("0", ("0",)),
        ("2,0", ("2", "0")),
        (" 1 , 3 ", ("1", "3")),
        (UUID, (UUID,)),
        ("GPU-8932f937", ("GPU-8932f937",)),  # CUDA takes unique beginnings
        (f"{MIG},{OLD_MIG}", (MIG, OLD_MIG)),
        (f"0,{UUID}", ("0", UUID)),
        ("", ()),
        ("-1", ()),
        ("NoDevFiles", ()),
        ("0,-1,1", ("0",)),  # CUDA stops at the first that is none
        ("0,,1", ("0",)),
        ("all", ()),
    ],
)
def test_visible_devices_are_read_as_cuda_reads_them(value, entries):
    assert parse_visible(value) == entries


@pytest.mark.parametrize(
    ("value", "indices"),
    [("0", ("0",)), ("0,2-4", ("0", "2", "3", "4")), ("", ()), ("gpu:a100:1", ()), ("3-", ())],
)
def test_slurms_lists_of_indices(value, indices):
    assert parse_indices(value) == indices


@pytest.mark.parametrize(
    ("environ", "present", "devices"),
    [
        ({}, 4, None),
        ({"CUDA_VISIBLE_DEVICES": ""}, 4, ()),
        ({"CUDA_VISIBLE_DEVICES": "1", "SLURM_JOB_GPUS": "3"}, 4, ("1",)),
        ({"CUDA_VISIBLE_DEVICES": MIG}, 7, (MIG,)),
        ({"SLURM_JOB_GPUS": "3"}, 4, ("3",)),
        ({"SLURM_JOB_GPUS": "0-3", "SLURM_STEP_GPUS": "2"}, 4, ("2",)),
        ({"SLURM_JOB_GPUS": "3"}, 1, None),  # the cgroup hides the others: it is number 0 here
        ({"SLURM_GPUS_ON_NODE": "1"}, 1, None),
        ({"SLURM_JOB_ID": "7"}, 4, None),  # a site whose Slurm does not know of its GPUs
    ],
)
def test_assigned_devices(environ, present, devices):
    assert assigned_devices(environ, present) == devices


def test_slurm_that_does_not_say_which_gpu_is_a_configuration_error():
    with pytest.raises(ConfigurationError, match="1 of 4 GPUs and does not say which"):
        assigned_devices({"SLURM_GPUS_ON_NODE": "1"}, present=4)


def test_restricting_follows_slurm_only_where_nobody_else_spoke():
    unset, given = {"SLURM_JOB_GPUS": "1,3"}, {"SLURM_JOB_GPUS": "1", "CUDA_VISIBLE_DEVICES": "0"}
    restrict_devices(unset, present=4)
    restrict_devices(given, present=4)
    assert unset["CUDA_VISIBLE_DEVICES"] == "1,3"
    assert unset["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert given["CUDA_VISIBLE_DEVICES"] == "0"


def test_mig_instances_stand_for_their_gpu():
    assert parse_nvidia_smi(LISTING) == (UUID, MIG, OLD_MIG)
    assert parse_nvidia_smi("No devices found.\n") == ()


def test_own_gpus_are_ids_unless_an_engine_named_others():
    present = (UUID, MIG)
    assert own_gpus({}, present) == present
    assert own_gpus({"CUDA_VISIBLE_DEVICES": "1"}, present) == ("1",)
    assert own_gpus({"CUDA_VISIBLE_DEVICES": "-1"}, present) == ()


@pytest.mark.parametrize(
    ("device", "chosen"),
    [
        ("auto", ("a", "b", "c")),
        ("cuda", ("a", "b", "c")),
        ("cuda:1", ("b",)),
        ("cuda:2,0", ("c", "a")),
        ("cpu", ()),
        ("mps", ()),
    ],
)
def test_selecting_gpus(device, chosen):
    assert select_gpus(device, ("a", "b", "c")) == chosen


@pytest.mark.parametrize(
    ("device", "gpus", "message"),
    [
        ("cuda", (), "no NVIDIA GPU was found"),
        ("cuda:3", ("a", "b"), "3 is not one of 0 to 1"),
        ("cuda:0,0", ("a", "b"), "0 is not one of 0 to 1, once"),
        ("gpu", ("a",), "possible are auto, cpu, mps, cuda, cuda:0,2"),
        ("cuda:", ("a",), "possible are"),
        ("cuda:-1", ("a",), "possible are"),
    ],
)
def test_impossible_devices_are_refused(device, gpus, message):
    with pytest.raises(LaunchError, match=message):
        select_gpus(device, gpus)


def test_auto_without_a_gpu_is_the_cpu():
    assert select_gpus("auto", ()) == ()
