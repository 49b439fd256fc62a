"""Steps of a command: their time, warnings as steps, and no bars of other libraries."""

import logging
import re
import warnings

import datasets
import pytest
from huggingface_hub.utils import are_progress_bars_disabled
from transformers.utils import logging as transformers_logging

from hf_layerfuse import LayerFuseWarning
from hf_layerfuse.pipeline.progress import say, steps


def bars() -> tuple[bool, bool, bool]:
    return (
        transformers_logging.is_progress_bar_enabled(),
        not are_progress_bars_disabled(),
        not datasets.are_progress_bars_disabled(),
    )


@pytest.mark.usefixtures("fresh_accelerate")
def test_steps(capsys) -> None:
    """A step is a line with its time; a warning is a step; bars other than those of downloads are off, and back on
    after an error."""
    before = bars()

    def work() -> None:
        assert bars() == (False, before[1], False)
        say("loading")
        logging.getLogger("hf_layerfuse.models.verify").warning("worse than chance")
        warnings.warn("worse than chance", LayerFuseWarning, stacklevel=1)
        raise KeyError

    with pytest.raises(KeyError):
        steps()(work)()
    assert bars() == before
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(r"\d+", "0", line) for line in lines] == ["[   0 s] loading", "[   0 s] warning: worse than chance"]
    logging.getLogger("hf_layerfuse.models.verify").warning("after")
    assert "[" not in capsys.readouterr().err
