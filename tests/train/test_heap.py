"""The heap is kept while training: a repeated step finds its pages where it left them."""

import os
import subprocess
import sys

import pytest

STEPS = """
import resource, numpy
from ambergrade.train.heap import kept_heap
def resident():
    return int(open("/proc/self/statm").read().split()[1])
def step():
    return [numpy.ones(500_000) for _ in range(20)]
def faults_of_five_steps():
    for _ in range(3):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
numpy.ones(10).sum()
begin = resident()
with kept_heap():
    faults, held = faults_of_five_steps(), resident() - begin
print(faults, held, resident() - begin)
"""
PAGES = 20 * 500_000 * 8 // os.sysconf("SC_PAGESIZE")
"""Of one step."""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's thresholds")
def test_no_page_is_mapped_again_and_all_is_handed_back():
    plain = {name: value for name, value in os.environ.items() if "MALLOC" not in name and name != "GLIBC_TUNABLES"}

    def run(**added: str) -> list[int]:
        done = subprocess.run(
            [sys.executable, "-c", STEPS], capture_output=True, text=True, check=True, env={**plain, **added}
        )
        return [int(word) for word in done.stdout.split()]

    faults, held, left = run()
    assert faults < PAGES / 10
    assert held > PAGES * 0.9
    assert left < PAGES * 0.1
    faults, held, _ = run(MALLOC_MMAP_THRESHOLD_="100000")  # the user's own word stands
    assert faults > 5 * PAGES * 0.9
    assert held < PAGES * 0.1
