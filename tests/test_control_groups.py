"""The memory that control groups leave a process, read from files that are laid out as systems lay them out."""

from __future__ import annotations

import pytest

from chatterbox_turbo.runtime.cpu.process_memory import available

TOTAL, FREE = 64_000_000 * 1024, 48_000_000 * 1024
ROOT_V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
UNLIMITED = 9223372036854771712  # as version 1 writes it


@pytest.fixture
def system(tmp_path):
    """A function that lays out a system: ``own``, ``mounts``, and of groups by folder the values of their files."""

    def laid_out(own, mounts, groups):
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/meminfo").write_text(f"MemTotal: {TOTAL // 1024} kB\nMemAvailable: {FREE // 1024} kB\n")
        (tmp_path / "proc/self/cgroup").write_text(own)
        (tmp_path / "proc/self/mountinfo").write_text("22 1 8:1 / / rw - ext4 /dev/sda1 rw\n" + mounts)
        for folder, files in groups.items():
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            for name, value in files.items():
                (tmp_path / folder / name).write_text(f"{value}\n")
        return tmp_path

    return laid_out


def v2(limit, used, inactive=0, **others):
    files = {"max": limit, "current": used, "stat": f"anon {used}\ninactive_file {inactive}", **others}
    return {f"memory.{name}": value for name, value in files.items()}


def v1(limit, used, inactive=0, hierarchy=1):
    statistics = f"inactive_file 1\nhierarchical_memory_limit {limit}\ntotal_inactive_file {inactive}"
    files = {"limit_in_bytes": limit, "usage_in_bytes": used, "stat": statistics, "use_hierarchy": hierarchy}
    return {f"memory.{name}": value for name, value in files.items()}


UNIT = "sys/fs/cgroup/system.slice/tts.service"


def test_a_systemd_unit_has_what_its_own_group_leaves(system):
    groups = {
        "sys/fs/cgroup": {"memory.stat": "anon 1"},  # the highest has no limit
        "sys/fs/cgroup/system.slice": v2("max", 9_000_000),
        UNIT: v2(4_000_000, 3_900_000, inactive=50_000),
    }
    assert available(system("0::/system.slice/tts.service\n", ROOT_V2, groups)) == (150_000, 4_000_000)


def test_what_is_above_a_group_limits_it_as_well(system):
    """Slurm limits a job, and its steps have more or nothing of their own; the memory of others counts."""
    job = "sys/fs/cgroup/system.slice/slurmstepd.scope/job_7"
    groups = {
        job: v2(8_000_000, 7_500_000),
        f"{job}/step_0": v2(9_000_000, 1_000_000),
        f"{job}/step_0/user": {"memory.stat": "anon 1"},  # a controller that is off
        f"{job}/step_0/user/task_0": v2("max", 1_000_000),
    }
    own = "0::/system.slice/slurmstepd.scope/job_7/step_0/user/task_0\n"
    assert available(system(own, ROOT_V2, groups)) == (500_000, 8_000_000)


def test_the_least_limit_and_the_least_that_is_free_may_be_of_two_groups(system):
    groups = {"sys/fs/cgroup/a": v2(9_000_000, 8_900_000), "sys/fs/cgroup/a/b": v2(2_000_000, 500_000)}
    assert available(system("0::/a/b\n", ROOT_V2, groups)) == (100_000, 2_000_000)


def test_memory_above_which_allocations_sleep_is_none_to_plan_with(system):
    groups = {UNIT: v2(4_000_000, 1_000_000, high=3_000_000)}
    assert available(system("0::/system.slice/tts.service\n", ROOT_V2, groups)) == (2_000_000, 3_000_000)


@pytest.mark.parametrize(
    ("own", "shown"),
    [
        ("/", "/"),  # a namespace of its own, as Docker and Kubernetes make it on version 2
        ("/docker/abc", "/docker/abc"),  # the host's names
        ("/docker/abc/inner", "/docker/abc"),  # in a group below that has no limit
        ("/../outside", "/"),  # moved out of the namespace
        ("/docker/abc (deleted)", "/docker/other"),  # nothing of it is shown
    ],
)
def test_a_container_sees_a_part_of_the_hierarchy(system, own, shown):
    mounts = f"30 23 0:26 {shown} /sys/fs/cgroup ro,nosuid - cgroup2 cgroup rw\n"
    groups = {"sys/fs/cgroup": v2(4_000_000, 1_000_000), "sys/fs/cgroup/inner": v2("max", 1_000_000)}
    assert available(system(f"0::{own}\n", mounts, groups)) == (3_000_000, 4_000_000)


V1 = (
    "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n"
    "34 31 0:31 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 / /sys/fs/cgroup/memory rw shared:3 - cgroup cgroup rw,memory\n"
    "36 31 0:33 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
)
OWN_V1 = "5:cpuacct,cpu:/\n4:memory:/slurm/uid_0/job_7\n1:name=systemd:/user.slice\n0::/user.slice\n"
JOB_V1 = "sys/fs/cgroup/memory/slurm/uid_0/job_7"


def test_version_1_and_both_at_once(system):
    groups = {
        "sys/fs/cgroup/memory": v1(UNLIMITED, 30_000_000),
        "sys/fs/cgroup/memory/slurm": v1(5_000_000, 4_000_000),
        JOB_V1: v1(6_000_000, 2_000_000, inactive=7),
        "sys/fs/cgroup/unified/user.slice": {"cgroup.procs": "1"},  # memory is controlled by version 1
    }
    assert available(system(OWN_V1, V1, groups)) == (1_000_000, 5_000_000)


def test_in_version_1_a_group_may_bind_none_below_it(system):
    groups = {
        "sys/fs/cgroup/memory/slurm": v1(5_000_000, 4_000_000, hierarchy=0),
        "sys/fs/cgroup/memory/slurm/uid_0": v1(UNLIMITED, 2_000_000),
        JOB_V1: v1(6_000_000, 2_000_000, inactive=7),
    }
    assert available(system(OWN_V1, V1, groups)) == (4_000_007, 6_000_000)


def test_a_folder_with_a_blank(system):
    mounts = "30 23 0:26 / /sys/fs/control\\040groups rw - cgroup2 cgroup2 rw\n"
    groups = {"sys/fs/control groups/my unit": v2(4_000_000, 1_000_000)}
    assert available(system("0::/my unit\n", mounts, groups)) == (3_000_000, 4_000_000)


@pytest.mark.parametrize(
    "groups",
    [{}, {UNIT: v2("max", 1_000_000)}, {UNIT: v2(TOTAL + 1, 1_000_000)}, {UNIT: {"memory.max": "4000000"}}],
    ids=["nothing to read", "no limit", "more than there is", "no usage"],
)
def test_without_a_limit_it_is_the_machines(system, groups):
    assert available(system("0::/system.slice/tts.service\n", ROOT_V2, groups)) == (FREE, TOTAL)
