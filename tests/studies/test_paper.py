"""The paper's numbers: where each is found, and that none was mistyped into another's place."""

from advmoe.studies import paper


def test_numbers_of_the_paper():
    numbers = paper.numbers("table2", "CIFAR-10", "ResNet-18", "AT (Dense)")
    assert (numbers["ra_autoattack"], numbers["ra_pgd50"]) == (44.72, 50.13)
    assert (numbers["sa"], numbers["gmacs"]) == (82.99, 0.54)
    assert numbers["ra_pgd50_std"] == 0.13  # which table 1 gives
    assert paper.numbers("table3", "ImageNet", "DeiT-Tiny", "AT (MoE)")["ra_pgd50"] == 44.63
    assert paper.numbers("table1", None, None, "AT (Dense)") == {}
    assert paper.numbers("table3", "ImageNet", "DeiT-Tiny", "AT (S-Dense)") == {}
    assert paper.figure(3)["standard_moe_M1"] == 0.0 and paper.figure(6) == {}


def test_a_row_s_numbers_are_numbers_alone():
    numbers = paper.numbers("table1", "CIFAR-10", "DenseNet", "AdvMoE")
    assert numbers == {
        "model_scale": 0.5, "ra_pgd50": 39.97, "ra_pgd50_std": 0.11, "sa": 70.13, "sa_std": 0.15, "gmacs": 0.03,
    }  # fmt: skip


def test_what_table_2_repeats_of_table_1_is_the_same_there():
    rows = {(row["table"], row["dataset"], row["backbone"], row["method"]): row for row in paper.reported()["rows"]}
    assert len(rows) == len(paper.reported()["rows"])  # no row twice
    repeated = [key for key in rows if key[0] == "table2"]
    assert len(repeated) == 2 * 2 * 5
    for key in repeated:
        first, second = rows["table1", *key[1:]], rows[key]
        assert all(second[name] == first[name] for name in ("ra_pgd50", "sa", "gmacs", "model_scale"))
        assert second["ra_autoattack"] < second["ra_pgd50"]  # AutoAttack is the stronger


def test_figures_without_numbers_in_the_text_have_none():
    assert [number for number in range(1, 9) if paper.figure(number)] == [3, 4]
    assert paper.figure(4)["unsuccessful_on_both_1"] == 31.74
