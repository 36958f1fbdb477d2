from advmoe.report import alt_text


def test_lines():
    points = [{"x": 1, "y": 20.0}, {"x": 2, "y": 50.0}, {"x": 3, "y": None}, {"x": 4, "y": 40.0}]
    series = {"AT": points, "one": points[:1], "none": [{"x": 1, "y": None}]}
    assert alt_text.of_lines(series, xlabel="epoch", ylabel="accuracy") == (
        "Lines of accuracy against epoch. AT: from 20.0 at 1 to 40.0 at 4, between 20.0 and 50.0. one: 20.0 at 1."
    )
    dashed = alt_text.of_lines({}, xlabel="r", ylabel="RA", references=[["AT (Dense)", 45.5]])
    assert dashed == "Lines of RA against r. Nothing was measured. AT (Dense): dashed line at 45.5."


def test_bars():
    groups = {"clean": {"AT": {"y": 80.0}, "AdvMoE": {"y": None}}, "pgd": {}}
    assert (
        alt_text.of_bars(groups, ylabel="accuracy (%)")
        == "Bars of accuracy (%). clean: AT 80.0. pgd: nothing measured."
    )
    assert alt_text.of_bars({}, ylabel="ms") == "Bars of ms. Nothing was measured."


def test_shares():
    shares = {"all": {"kept": 0.25, "lost": 0.7512}}
    assert alt_text.of_shares(shares, xlabel="%") == "Bars of shares. all: kept 25.0 %, lost 75.1 %."
    assert alt_text.of_shares({}, xlabel="%") == "Bars of shares. Nothing was measured."


def test_a_sweep():
    curves = {
        "pgd": {
            "norm": "linf",
            "points": [{"eps": 0.0, "robust_accuracy": 0.9}, {"eps": 8 / 255, "robust_accuracy": 0.5}],
        }
    }
    assert alt_text.of_sweep(curves) == "Lines of robust accuracy against eps. pgd: 90.0 % at 0, 50.0 % at 8/255."


def test_a_distribution():
    series = {"AdvMoE": {"edges": [0.0, 0.5, 1.0], "shares": [0.25, 0.75]}}
    # The mean of the bins' middles: 0.25 * 0.25 + 0.75 * 0.75 = 0.625.
    assert (
        alt_text.of_histogram(series, xlabel="IoU", ylabel="%")
        == "Distribution of IoU. AdvMoE: mean 0.625, most between 0.5 to 1."
    )


def test_a_heat_map():
    table = {"rows": ["a", "b"], "columns": ["0", "1"], "values": [[0.1, None], [0.9, 0.5]]}
    assert alt_text.of_heatmap(table, xlabel="layer", ylabel="expert") == (
        "Table of colours, 2 rows (expert) by 2 columns (layer): from 0.1 (expert a, layer 0) to 0.9 "
        "(expert b, layer 0)."
    )
    unknown = {"rows": ["a"], "columns": ["0"], "values": [[None]]}
    assert alt_text.of_heatmap(unknown, xlabel="", ylabel="") == "A table of colours without a known value."


def test_a_heat_map_in_groups():
    table = {"rows": ["cat"], "columns": ["0"], "members": ["expert 0", "expert 1"], "values": [[0.25, 0.75]]}
    assert alt_text.of_heatmap(table, xlabel="layer", ylabel="class") == (
        "Table of colours, 1 rows (class) by 2 columns (layer): from 0.25 (class cat, layer 0, expert 0) to 0.75 "
        "(class cat, layer 0, expert 1)."
    )


def test_a_flow():
    panels = {"clean": {"load": [[0.75, 0.25], [0.5, 0.5]], "flows": [[[0.5, 0.25], [0.0, 0.25]]]}}
    assert alt_text.of_flow(panels).endswith("The widest out of each layer, clean: layer 0 expert 0 to 0 (50 %).")
