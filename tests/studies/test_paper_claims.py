"""The list of the paper's claims: complete, each once, each with a place and a study."""

from advmoe.studies.catalogue import STUDIES
from advmoe.studies.paper_claims import BEYOND, PAPER_CLAIMS


def test_every_claim_stands_once_and_has_a_place_and_a_study():
    keys = [(each.study, each.claim, each.comparisons, each.measure, each.setting) for each in PAPER_CLAIMS]
    assert len(set(keys)) == len(keys)
    assert {each.study for each in PAPER_CLAIMS} == set(STUDIES)
    for each in PAPER_CLAIMS:
        assert each.place == BEYOND or each.place.startswith(("abstract", "sec. ")), each
        assert each.statement and not each.statement.endswith(".")
        assert all(" < " in comparison for comparison in each.comparisons)


def test_every_table_and_figure_with_numbers_is_named():
    """Figure 1a is a drawing."""
    places = " ".join(each.place for each in PAPER_CLAIMS)
    parts = ["table 1", "table 2", "table 3", "fig. 1b", *(f"fig. {number}" for number in range(2, 9)), "app. C"]
    assert [part for part in parts if part not in places] == []
