import pytest

from advmoe.report.html import joined
from advmoe.report.results import load_results
from advmoe.report.run_sections import accuracy, commands, dissection, introduction, run_section, sweep, tiles, training


@pytest.fixture
def load(make_run):
    """The made-up run, loaded."""

    def get(**options):
        (run,) = load_results([make_run("advmoe", **options)])
        return run

    return get


def test_the_numbers_one_looks_for_first(load, parsed):
    page = parsed(tiles(load(only={"evaluation"})))
    assert list(zip(page.texts("dt"), page.texts("dd"), strict=True)) == [
        ("Clean accuracy (SA)", "87.5 %"),
        ("Robust, pgd-10", "50.0 %95 % interval 35.2 to 64.8"),
        ("Robust, routed", "37.5 %95 % interval 24.2 to 53.0"),
        ("Robust, worst case", "35.0 %over all attacks at once"),
        ("Cost of one image", "0.139 GMACsselected pathway, routers included"),
        ("Time of one image", "4.25 mscpu, batch 128, 2 threads"),
    ]


def test_the_gap_is_told_with_its_budgets(load, parsed):
    run = load(only={"evaluation"})
    run.evaluation["gradient_passes"] = {"straight_through": 10, "worst_case": 320}
    (gap,) = (text for text in parsed(*accuracy(run)).texts("p") if "Masking gap" in text)
    assert gap.endswith("withstood: 320 in the worst case, 10 under that PGD.")


def test_accuracy_under_each_attack(load, parsed):
    page = parsed(*accuracy(load(only={"evaluation"})))
    assert page.texts("caption")[0] == "advmoe on 40 test images, linf eps 8/255."
    rows = [page.texts("td")[at : at + 4] for at in range(0, 16, 4)]
    assert rows == [
        ["87.5", "\N{EN DASH}", "\N{EN DASH}", "\N{EN DASH}"],
        ["50.0", "35.2 to 64.8", "15 of 35", "12.5 s"],
        ["37.5", "24.2 to 53.0", "20 of 35", "12.5 s"],
        ["35.0", "\N{EN DASH}", "\N{EN DASH}", "\N{EN DASH}"],
    ]
    assert "Masking gap, straight-through PGD less the worst case: 15.0 percentage points." in page.texts("p")
    # Of the attacks, one is made of parts: its second part was given what the first had left.
    assert page.texts("caption")[1] == "Parts of the attacks on advmoe."
    assert page.texts("td")[16:] == ["routed", "35", "12", "routed", "23", "8"]
    assert page.texts("li") == []


def test_warnings_of_attacks_and_checks(load, parsed):
    attacks = {
        "pgd-10": {"flags": {"5 steps cannot <cross> the ball": 3}},
        "routed": {"skipped": "the model has no MoE layers"},
    }
    checks = [
        {"name": "pixels", "passed": True, "detail": "from 0 to 1"},
        {"name": "gradients", "passed": False, "detail": "40 of 40 are 0"},
    ]
    evaluation = {"clean_accuracy": 0.5, "robust_accuracy": {"pgd-10": 0.25}, "attacks": attacks, "checks": checks}
    page = parsed(*accuracy(load(only={"evaluation"}, evaluation=evaluation)))
    assert page.texts("li") == [
        "pgd-10: 5 steps cannot <cross> the ball",
        "routed was skipped: the model has no MoE layers",
        "check gradients failed: 40 of 40 are 0",
    ]
    assert page.texts("caption")[0].endswith("None test images, eps unknown.")


def test_training(load, album, parsed):
    page = parsed(*training(load(only={"metrics"}), album))
    assert page.texts("p")[0] == (
        "2 epochs in 8 s, 320.0 images/s on average. In the last epoch some expert was chosen for no image in layers 1."
    )
    assert page.texts("title") == ["Training losses", "Validation accuracy", "Share of the busiest expert"]
    losses, accuracies, busiest = page.texts("desc")
    assert "routers: cross-entropy: from 2 at 1 to 1 at 2." in losses
    assert "experts: beta x KL(clean || adversarial): from 0.25 at 1 to 0.5 at 2." in losses
    assert "accuracy" not in losses
    assert "clean: from 25.0 at 1 to 50.0 at 2. robust: from 12.5 at 1 to 25.0 at 2." in accuracies
    assert "from 0.75 (epoch 1, MoE layer 0) to 1 (epoch 1, MoE layer 1)" in busiest
    assert {"routers: cross-entropy", "epoch", "MoE layer"} <= set(page.texts("text"))


def test_training_of_a_plain_model_shows_no_experts(load, album, parsed):
    page = parsed(*training(load(routed=False, only={"metrics"}), album))
    assert page.texts("title") == ["Training losses", "Validation accuracy"]
    assert page.texts("desc")[0] == (
        "Lines of loss term, as weighted (nats) against epoch. cross-entropy: from 2 at 1 to 1 at 2. "
        "beta x KL(clean || adversarial): from 0.25 at 1 to 0.5 at 2."
    )


def test_many_epochs_are_thinned_out_where_each_takes_a_row(load, album, parsed):
    layers = [{"layer": 0, "load": [0.5, 0.5], "dead_experts": []}]
    metrics = [{"train": None, "val": None, "seconds": 1, "layers": layers} for _ in range(60)]
    page = parsed(*training(load(only={"metrics"}, metrics=metrics), album))
    assert page.texts("title") == ["Share of the busiest expert"]
    assert "20 rows (epoch) by 1 columns (MoE layer)" in page.texts("desc")[0]
    assert page.texts("p")[0] == "60 epochs in 60 s."


def test_a_sweep(load, album, parsed):
    page = parsed(sweep(load(only={"sweep"}), album))
    assert page.texts("desc") == [
        "Lines of robust accuracy against eps. pgd-10: 87.5 % at 0, 70.0 % at 4/255, 50.0 % at 8/255. "
        "worst case: 87.5 % at 0, 60.0 % at 4/255, 35.0 % at 8/255."
    ]
    assert page.texts("figcaption") == ["Robust accuracy against eps 40 test images, with 95 % intervals."]


def test_a_sweep_not_to_be_believed(load, album, parsed):
    run = load(only={"sweep"})
    run.sweep["curves"]["pgd-10"]["masking"] = {"suspected": True, "reasons": ["gradient masking suspected: it rises"]}
    page = parsed(sweep(run, album))
    assert page.texts("figcaption")[0].endswith("Crosses and dashes mark curves not to be believed.")
    assert "pgd-10: gradient masking suspected: it rises" in page.texts("text")


def test_a_dissection(load, album, parsed):
    page = parsed(*dissection(load(only={"dissection"}), album))
    assert page.texts("title") == ["What survived pgd-10", "Choices changed by the attack", "Expert load"]
    survived, changed, load_ = page.texts("desc")
    shares = "1 both survive 25.0 %, 2 only routing fails 25.0 %, 3 only prediction fails 12.5 %, 4 both fail 37.5 %"
    assert survived == f"Bars of shares. right clean (n = 35): {shares}. all images (n = 40): {shares}."
    assert changed == "Bars of images (%). MoE layer 0: changed 5. MoE layer 1: changed 30.0."
    assert load_.endswith(
        "4 rows by 2 columns (MoE layer): from 0 (expert 1, clean, MoE layer 1) to 1 (expert 0, clean, MoE layer 1)."
    )


def test_a_dissection_where_nothing_is_right_clean(load, album, parsed):
    run = load(only={"dissection"})
    run.dissection["pgd-10"]["categories_of_clean_correct"] = None
    survived = parsed(*dissection(run, album)).texts("desc")[0]
    assert "right clean" not in survived and "all images (n = 40)" in survived


def test_what_made_it(load, parsed):
    run = load(only={"metrics", "manifest"})
    page = parsed(*commands(run))
    assert page.texts("b")[:2] == ["training", "accuracy under attack"]
    assert page.texts("span", "verdict") == ["there", *["missing"] * 5]
    assert page.texts("code")[:2] == ["advmoe train --run-dir runs/advmoe", f"advmoe evaluate {run.path}"]
    assert run.config_text.strip() in page.texts("pre")
    assert "torch 2.13.0" in page.texts("td") and "command" not in page.texts("th")


def test_without_a_manifest(load, parsed):
    assert "There is no manifest.json" in parsed(*commands(load(only={"metrics"}))).texts("p")[0]


def test_what_is_missing_is_named(load, parsed):
    page = parsed(*introduction(load(only={"metrics"}), "run-3"))
    assert page.texts("p", "lead") == ["AdvMoE: resnet18, r = 0.5, N = 2, on digits."]
    absent = "accuracy under attack, sweep over eps, dissection of the attack, pathways, gallery"
    assert f"Missing or unfinished: {absent}. See the commands that make them." in page.texts("p")
    assert page.attributes("a", "href") == ["#run-3-made"]


def test_files_that_were_not_used_are_told(load, parsed):
    notes = ["train: 2 files left out (<rule>): 2 '.heic'", "val: 1 image left out"]
    page = parsed(*introduction(load(manifest={"data_notes": notes}), "x"))
    assert page.texts("li") == notes and "Files that were not used:" in page.texts("p")


def test_why_there_is_no_gallery(make_run, parsed):
    from advmoe.report.results import with_gallery

    (run,) = load_results([make_run("a", only={"metrics"})])
    assert "No gallery could be made: no <data>" in parsed(*introduction(with_gallery(run, "no <data>"), "x")).texts(
        "p"
    )


def test_a_whole_section(load, album, parsed):
    section = run_section(load(), album, 2, alone=False)
    assert (section.ident, section.title) == ("run-2", "advmoe")
    titles = [
        "Robust accuracy", "Training", "Robustness against the attack's strength", "The attack, dissected", "Gallery",
        "Commands and configuration",
    ]  # fmt: skip
    assert [title for _, title in section.parts] == titles
    page = parsed(section.html)
    assert page.texts("h3") == titles
    assert page.attributes("h3", "id") == [ident for ident, _ in section.parts]
    assert page.texts("p", "lead") != []


def test_alone_on_the_page_it_is_introduced_by_the_summary(load, album, parsed):
    section = run_section(load(only=set()), album, 1, alone=True)
    assert parsed(section.html).texts("p", "lead") == []
    assert [title for _, title in section.parts] == ["Commands and configuration"]


def test_strings_of_a_run_are_escaped(load, album, parsed):
    hostile = "<script>alert(1)</script>\"'&"
    run = load(only={"manifest"}, manifest={"cpu": hostile, "command": ["advmoe", hostile]})
    run.config["data"]["name"] = run.config["model"]["name"] = hostile
    for text in (run_section(run, album, 1, alone=False).html, joined(introduction(run, "x"))):
        assert "<script>" not in text and parsed(text).texts("script") == []
        assert f"AdvMoE: {hostile}, r = 0.5, N = 2, on {hostile}." in parsed(text).texts("p", "lead")
