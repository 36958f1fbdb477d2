"""What makes two runs, or two measurements, the same."""

import pytest

from advmoe.config import Config, field_names
from advmoe.studies.keys import digest, measure_key, run_key

OF_ROUTED = {
    "model.num_experts", "model.router", "model.router_norm", "model.route_per", "model.experts", "model.experts_init",
}  # fmt: skip
NO_RESULT = {
    "data.root", "data.download", "data.workers", "training.init_from", "training.alternation",
    "training.checkpoint_minutes", "training.frozen_norms", "training.teacher_weights",
}  # fmt: skip
"""An alternation is of `advmoe` alone, `at` leaves no norms frozen, and a teacher's weights are told apart with it."""
OF_ATTACKS = {name for name in field_names() if name.startswith("attack.")}


def key(start=None, **groups):
    return run_key(Config.from_dict({"training": {"method": "at"}, **groups}), start)


@pytest.mark.parametrize(
    ("kind", "without"),
    [
        ("moe", NO_RESULT | OF_ATTACKS),
        ("s-dense", NO_RESULT | OF_ATTACKS | OF_ROUTED),
        ("dense", NO_RESULT | OF_ATTACKS | OF_ROUTED | {"model.scale"}),
    ],
)
def test_every_field_counts_but_those_that_change_no_result(kind, without):
    settings = {"model": {"kind": kind}, "training": {"method": "at"}}
    same = set()
    for name in field_names():
        config = Config.from_dict(settings)
        group, field = name.split(".")
        setattr(getattr(config, group), field, "something else")  # what no check would let pass, whatever the field
        if run_key(config) == key(model={"kind": kind}):
            same.add(name)
    assert same == without
    advmoe = [key(training={"method": "advmoe", "alternation": each}) for each in ("both", "shared-attack")]
    assert len({*advmoe, key()}) == 3


def test_a_key_holds_no_defaults_so_that_fields_to_come_leave_it_alone():
    groups = {"model": {"width": 16}, "data": {}, "threat": {}, "training": {"method": "at", "lr": 0.2}}
    assert key(model={"width": 16}, training={"method": "at", "lr": 0.2}) == digest({"config": groups, "start": None})
    assert key(model={"num_experts": 2, "router": "layer"}, threat={"eps": "8/255"}) == key()


def test_runs_of_before_frozen_norms_could_be_chosen_keep_their_keys():
    def of(method, **chosen):
        model = {"kind": "sparse"} if method == "sparse" else {}
        return key(model=model, training={"method": method, "init_from": "start", **chosen})

    for method, earlier, other in (("at-routers", "keep", "refresh"), ("sparse", "running", "keep")):
        groups = {"model": {"kind": "sparse"} if method == "sparse" else {}, "data": {}, "threat": {}}
        before = digest({"config": {**groups, "training": {"method": method}}, "start": None})
        assert of(method, frozen_norms=earlier) == before != of(method, frozen_norms=other)
    assert of("at-routers") == of("at-routers", frozen_norms="refresh")
    assert of("sparse") == of("sparse", frozen_norms="running")


def test_a_teacher_counts_by_what_it_is(tmp_path):
    for name, text in (("a", "one"), ("b", "one"), ("c", "two")):
        (tmp_path / f"{name}.py").write_text(text)
        (tmp_path / f"{name}.safetensors").write_text(text)

    def of(name, weights=None):
        file = None if weights is None else f"{tmp_path / weights}.safetensors"
        return key(training={"method": "at", "teacher": f"{tmp_path / name}.py:net", "teacher_weights": file})

    assert of("a") == of("b") != of("c")
    assert of("a") != key(training={"method": "at", "teacher": f"{tmp_path / 'a'}.py:other"})
    assert of("a", "a") == of("b", "b") != of("a", "c") and of("a", "a") != of("a")
    zoo = [key(training={"method": "at", "teacher": f"zoo:{name}"}) for name in ("advmoe", "at-moe")]
    assert len({*zoo, of("a"), key()}) == 4


def test_a_strength_counts_by_its_value_and_not_its_spelling():
    assert key(threat={"eps": "4/255"}) == key(threat={"eps": 4 / 255}) != key(threat={"eps": "4.01/255"})


def test_what_a_run_starts_from_counts_by_its_key():
    assert len({key(), key("aaa"), key("bbb")}) == 3
    moved = {"training": {"method": "at", "init_from": "there"}}
    assert key("aaa", **moved) == key("aaa")


def folder(path, **splits):
    for split, classes in splits.items():
        for name, images in classes.items():
            (path / split / name).mkdir(parents=True)
            for image in range(images):
                (path / split / name / f"{image}.png").touch()
    return {"data": {"name": "folder", "root": str(path)}}


def test_images_of_a_folder_count_by_their_classes_and_numbers(tmp_path):
    small = {"train": {"cat": 2, "dog": 1}, "test": {"cat": 1, "dog": 1}}
    here, there = folder(tmp_path / "here", **small), folder(tmp_path / "there", **small)
    more = folder(tmp_path / "more", **small | {"train": {"cat": 3, "dog": 1}})
    renamed = folder(tmp_path / "renamed", **small | {"train": {"cat": 2, "fox": 1}})
    nothing = {"data": {"name": "folder", "root": str(tmp_path / "nothing")}}
    assert key(**here) == key(**there)
    assert len({key(**each) for each in (here, more, renamed, nothing)}) == 4
    # What lies in sub-folders of a class is of that class; that there is one changes no key by itself.
    assert key(**folder(tmp_path / "flat", train={"cat": 3})) != key(
        **folder(tmp_path / "deep", train={"cat": 2, "cat/more": 1})
    )
    # What the reader leaves out does not count: the cache that it makes itself above all.
    hidden = folder(tmp_path / "hidden", **small)
    (tmp_path / "hidden" / ".advmoe-cache").mkdir()
    (tmp_path / "hidden" / "train" / "cat" / ".DS_Store").touch()
    (tmp_path / "hidden" / "readme.txt").touch()
    assert key(**hidden) == key(**here)
    # Of the data sets that are what they are called, where they lie says nothing.
    assert key(data={"root": str(tmp_path / "here")}) == key()


def test_measurements_are_the_same_where_kind_options_and_what_they_are_compared_with_are():
    options = {"attacks": ["pgd"], "num_examples": 10}
    same = measure_key("evaluate", options, None)
    assert same == measure_key("evaluate", dict(reversed(options.items())), None)
    assert same.startswith("evaluate-") and len(same) == len("evaluate-") + 12
    others = [("dissect", options, None), ("evaluate", options | {"num_examples": 11}, None)]
    assert len({same, *(measure_key(*other) for other in others), measure_key("evaluate", options, "abc")}) == 4
