"""tools/published.py: the corrected figures are those of the formulas, worked out by hand elsewhere."""

import pytest

import published


def test_corrected_figures():
    assert published.exact_bytes(1.1465) == pytest.approx(2.024, abs=5e-4)
    assert published.exact_bytes(0.9901) == pytest.approx(1.748, abs=5e-4)
    found = [published.exact_bytes(bpb) for bpb in published.PR1106_TSTEP.values()]
    assert found == pytest.approx([2.043, 2.032, 2.027, 2.024], abs=1e-3)
    assert published.whole_range(1.3485, 0.05, 0.95) == pytest.approx(1.50, abs=5e-3)


def test_boundaries_cost_about_28_bits_a_window():
    """1.65 beginnings a window of 2,048: 11 bits for how many, 11 for each place, less their order."""
    assert published.boundary_bpb(2048) * 2048 * published.BYTES / published.TOKENS == pytest.approx(28.3, abs=0.7)


def test_table_prints(tool):
    printed = tool(published).stdout
    assert "2.024" in printed and "1.748, with boundaries about 1.75" in printed and printed.count("\n| ") == 10
