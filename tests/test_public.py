"""What `import basinlab` offers."""

import pytest

import basinlab


@pytest.mark.parametrize("name", [n for n in basinlab.__all__ if callable(getattr(basinlab, n))])
def test_every_public_name_has_an_example_in_its_docstring(name):
    assert ">>>" in getattr(basinlab, name).__doc__, "the doctests run it"


def test_an_unknown_name_is_named():
    with pytest.raises(AttributeError, match="'basinlab' has no attribute 'smaple'"):
        basinlab.smaple()
