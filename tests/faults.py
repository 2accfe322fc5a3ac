"""Faults that somebody could make, and the tests that have to fail for each of them.

A fault is an edit: `old`, which is in the file once, becomes `new`. `test_faults.py` makes them,
one at a time, in a copy of the project. Whoever changes the old text of a fault in the script
changes it here too; whoever finds a fault that no test notices adds a test, and the fault.
"""

from typing import NamedTuple


class Fault(NamedTuple):
    """An edit of one file of the project."""

    name: str
    old: str
    new: str
    tests: str  # in tests/, separated by spaces
    file: str = "train_mdlm.py"
    quick: bool = False  # whether its tests take so little time that it is always tried


FAULTS = []


def fault(name: str, old: str, new: str, tests: str, **more) -> None:
    FAULTS.append(Fault(name, old, new, tests, **more))


# ---- Once unnoticed


fault(
    "every step reads the same data",
    "    first = step * hp.batch_rows\n",
    "    first = 0\n",
    "test_noise.py::test_step_after_step_reads_the_split_from_front_to_back",
    quick=True,
)
fault(
    "the last weights are packed, not the average",
    "    trainer.optimizer.swap_average()\n    return trainer.model\n",
    "    return trainer.model\n",
    "test_train.py::test_the_average_is_what_is_validated_and_kept",
    quick=True,
)
fault(
    "the last weights are validated, not the average",
    "        self.optimizer.swap_average()\n        score, _ = score_windows(",
    "        score, _ = score_windows(",
    "test_train.py::test_the_average_is_what_is_validated_and_kept",
    quick=True,
)
fault(
    "the clock counts pauses",
    "        self.started += seconds\n",
    "",
    "test_train.py::test_pauses_are_not_training_time",
    quick=True,
)
fault(
    "a window begins as if <s> were before it",
    "token_bytes(windows.x0, windows.tokens[:, 0], split.luts)",
    "token_bytes(windows.x0, BOS_ID, split.luts)",
    "test_scores.py::test_the_bytes_of_a_window_depend_on_the_token_before_it",
    quick=True,
)
fault(
    "the T-step bound lacks its terminal term",
    "return terminal + weighted_nll(",
    "return weighted_nll(",
    "test_scores.py::test_the_t_step_bound_pays_for_what_its_last_step_leaves_visible",
    quick=True,
)
fault(
    "second moments are those of one process",
    "{name: all_reduce(moment) for",
    "{name: moment for",
    "test_train.py::test_two_processes_share_a_batch_and_take_one_step",
    quick=True,
)
fault(
    "an artifact may claim any size",
    "weights <= 8 * len(data) + 2**16",
    "weights <= 8 * len(data) + 2**99",
    "test_model.py::test_a_file_that_claims_a_huge_model_is_refused_before_anything_is_unpacked",
    quick=True,
)
