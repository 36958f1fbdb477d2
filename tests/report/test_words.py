from advmoe.report import words


def test_a_threat():
    assert words.of_threat({"norm": "linf", "eps": 8 / 255}) == "linf eps 8/255"
    assert words.of_threat({}) == "eps unknown"


def test_a_value_of_a_file_on_one_line():
    value = {"eps_used": 0.03125, "seeds": [0, 1], "name": None, "on": True, "inner": {"a": 2000}}
    assert words.flat(value) == "eps used 0.0312, seeds 0, 1, name \N{EN DASH}, on True, inner a 2,000"


def test_lines():
    points = [{"x": 1, "y": 20.0}, {"x": 2, "y": 50.0}, {"x": 3, "y": None}, {"x": 4, "y": 40.0}]
    series = {"AT": points, "one": points[:1], "none": [{"x": 1, "y": None}]}
    assert words.of_lines(series, "epoch", "accuracy") == (
        "Lines of accuracy against epoch. AT: from 20.0 at 1 to 40.0 at 4, between 20.0 and 50.0. one: 20.0 at 1."
    )


def test_bars():
    groups = {"clean": {"AT": {"y": 80.0}, "AdvMoE": {"y": None}}, "pgd": {}}
    assert words.of_bars(groups, "accuracy (%)") == "Bars of accuracy (%). clean: AT 80.0. pgd: nothing measured."


def test_shares():
    assert words.of_shares({"all": {"kept": 0.25, "lost": 0.7512}}) == "Bars of shares. all: kept 25.0 %, lost 75.1 %."


def test_a_sweep():
    curves = {
        "pgd": {
            "norm": "linf",
            "points": [{"eps": 0.0, "robust_accuracy": 0.9}, {"eps": 8 / 255, "robust_accuracy": 0.5}],
        }
    }
    assert words.of_sweep(curves) == "Lines of robust accuracy against eps. pgd: 90.0 % at 0, 50.0 % at 8/255."


def test_a_distribution():
    series = {"AdvMoE": {"edges": [0.0, 0.5, 1.0], "shares": [0.25, 0.75]}}
    # The mean of the bins' middles: 0.25 * 0.25 + 0.75 * 0.75 = 0.625.
    assert words.of_histogram(series, "IoU") == "Distribution of IoU. AdvMoE: mean 0.625, most between 0.5 to 1."


def test_a_heat_map():
    said = words.of_heatmap([[0.1, None], [0.9, 0.5]], ["a", "b"], ["0", "1"], "layer", "expert")
    assert said == "Table of colours, 2 rows (expert) by 2 columns (layer): from 0.1 (a, 0) to 0.9 (b, 0)."
    assert words.of_heatmap([[None]], ["a"], ["0"], "", "") == "A table of colours without a known value."
