"""Data sets by name: what pages, messages and the Hub say of them, and how they are fetched."""

from advmoe.tables import DATASETS


def test_what_a_data_set_says_of_itself():
    for name, each in DATASETS.items():
        assert each.about and each.origin and each.licence, name
        assert (each.fetch is not None) == each.origin.startswith("advmoe data fetch"), name
    assert [name for name, each in DATASETS.items() if each.streamed] == ["imagenet"]
    assert {name: each.hub for name, each in DATASETS.items() if each.hub} == {
        "cifar10": "cifar10", "cifar100": "cifar100", "imagenet": "imagenet-1k",
    }  # fmt: skip


def test_a_data_set_is_fetched_by_its_own_name(monkeypatch, tmp_path):
    fetched = []
    monkeypatch.setattr("advmoe.data.cifar.fetch_archive", lambda root, name: fetched.append((root, name)))
    for name in ("cifar10", "cifar100"):
        DATASETS[name].fetch(tmp_path)
    assert fetched == [(tmp_path, "cifar10"), (tmp_path, "cifar100")]
