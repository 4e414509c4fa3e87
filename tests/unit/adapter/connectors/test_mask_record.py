"""Which tokens a cache's masks have hidden, column by column; padding on the left is not counted as hidden."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvservice_adapter.connectors.transformers.mask_record import MaskRecord


@given(st.data())
def test_it_is_the_mask_that_its_parts_make_however_they_come_and_go(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 3))
    pads = data.draw(st.lists(st.integers(0, 5), min_size=rows, max_size=rows))
    bits = data.draw(st.binary(min_size=rows * 38, max_size=rows * 38))
    whole = np.unpackbits(np.frombuffer(bits, np.uint8)).astype(bool).reshape(rows, 304)[:, :300]
    whole &= np.arange(300) >= np.array(pads)[:, None]
    record = MaskRecord(pads, np.zeros((rows, 0), bool))
    columns = 0
    for step in data.draw(st.lists(st.integers(-20, 70), max_size=8)):
        if step < 0:
            columns = max(0, columns + step)
            record.crop(columns)
        else:
            end = min(300, columns + step)
            record.extend(whole[:, columns:end])
            columns = end

        assert record.columns == columns
        assert np.array_equal(record.visible(columns), whole[:, :columns])
        assert record.counts.tolist() == whole[:, :columns].sum(1).tolist()
        hidden = ~whole[:, :columns] & (np.arange(columns) >= np.array(pads)[:, None])
        assert np.array_equal(record.hidden(columns), hidden)
        assert record.has_hidden == hidden.any()


def test_columns_that_no_mask_has_named_are_visible_except_padding() -> None:
    record = MaskRecord([0, 2], np.array([[False, True], [False, False]]))

    assert record.visible(4).tolist() == [[True, False, True, True], [False, False, True, True]]
    assert record.counts.tolist() == [3, 2]
    assert record.hidden(4).tolist() == [[False, True, False, False], [False] * 4]
