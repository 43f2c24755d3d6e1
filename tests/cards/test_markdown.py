"""Whatever a name holds, a table's cell shows it as code and as nothing else."""

from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from fp4cast.cards.markdown import code, gigabytes, table


@given(st.text() | st.text(alphabet="`|<>&[]()!\\\n\r*_#~ -:/@"))
def test_a_name_is_code_in_one_cell(name):
    page = table([(code(name), "1")], ("a", "b"))
    tokens = MarkdownIt("commonmark", {"html": True, "linkify": False}).enable("table").parse(page)
    cells = [token for token in tokens if token.type == "inline"]
    assert [token.content for token in cells[2:]] == [code(name), "1"]
    assert [child.type for child in cells[2].children] == ["code_inline"]


def test_usual_names_are_shown_as_they_are():
    for name in ("model.layers.*.mlp.experts.gate_up_proj", "a/b@c", "block-0:1,2+3"):
        assert code(name) == f"`{name}`"
    assert len(code("x" * 5000)) == 125


def test_sizes():
    assert [gigabytes(n) for n in (1, 99_999_999, 10**8, 1_560_860_324_864)] == [
        "0.00 MB", "100.00 MB", "0.10 GB", "1,560.86 GB"
    ]  # fmt: skip
