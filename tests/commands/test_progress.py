"""What the commands of long studies make of --workers and --stack."""

from camdistill.commands.progress import STACK, at_once, processes
from camdistill.report.results import available_cores


def test_cores_work_on_a_cpu_and_one_process_with_a_stack_on_a_gpu() -> None:
    assert processes(None, "cpu") == available_cores()
    assert processes(None, "cuda") == 0
    assert at_once(None, "cpu") == 1
    assert at_once(None, "cuda") == STACK


def test_what_is_asked_for_is_taken() -> None:
    assert [processes(0, "cpu"), processes(3, "cuda")] == [0, 3]
    assert [at_once(5, "cpu"), at_once(2, "cuda")] == [5, 2]
