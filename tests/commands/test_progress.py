"""What the commands of long studies make of --workers and --stack."""

from camdistill.commands.progress import STACK, stack_size, worker_count
from camdistill.report.results import available_cores


def test_cores_work_on_a_cpu_and_one_process_with_a_stack_on_a_gpu() -> None:
    assert worker_count(None, "cpu") == available_cores()
    assert worker_count(None, "cuda") == 0
    assert stack_size(None, "cpu") == 1
    assert stack_size(None, "cuda") == STACK


def test_what_is_asked_for_is_taken() -> None:
    assert [worker_count(0, "cpu"), worker_count(3, "cuda")] == [0, 3]
    assert [stack_size(5, "cpu"), stack_size(2, "cuda")] == [5, 2]
