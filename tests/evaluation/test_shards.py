"""An evaluation's shards, done in this process as a cluster's would do them."""

import signal
from dataclasses import replace

import pytest

from advmoe.engines import EngineOptions, remote
from advmoe.engines.ledger import Ledger
from advmoe.errors import InputError, OtherSettings
from advmoe.evaluation.harness import Journal
from advmoe.evaluation.runs import evaluate_run
from advmoe.evaluation.shards import Shard, require_same
from advmoe.pool import Answer, Died

GIVEN = {
    "attacks": ["pgd-2", "pgd-2-soft"], "num_examples": 20, "batch_size": 4, "accelerator": "cpu",
    "allow": ["gradients"],
}  # fmt: skip


class Here:
    """An engine whose tasks are done in this process, as they come; the first ones end as `endings` say."""

    given, retries = "queued", 2

    def __init__(self, call, endings, shards):
        self.call, self.endings, self.shards, self.orders = call, endings, shards, []

    def ready(self, number):
        pass

    def give(self, order):
        self.orders.append(order)
        return True

    def answers(self, seconds):
        while self.orders:
            order = self.orders.pop(0)
            self.shards.append(order)
            ending = self.endings.pop(0) if self.endings else None
            if isinstance(ending, BaseException):
                if isinstance(ending, Exception):
                    yield Answer(order, error=ending)
                    continue
                raise ending
            self.call(order, "job")
            yield remote.answer(self.call.ledger, order, "job")

    def close(self):
        pass


@pytest.fixture
def here(monkeypatch):
    """What tasks shall end with, and the shards that were begun."""
    endings, shards = [], []

    def opened(self, prepare, arguments, *, places, ledger):
        call = remote.Call(prepare=prepare, arguments=arguments, threads=places[0].threads, ledger=ledger)
        return Here(call, endings, shards)

    monkeypatch.setattr(EngineOptions, "open", opened)
    return endings, shards


SLURM = EngineOptions(engine="slurm")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, make_digits_run):
    return make_digits_run(tmp_path_factory.mktemp("shards") / "run")


@pytest.fixture(scope="module")
def whole(run_dir, tmp_path_factory):
    """The evaluation by this process alone."""
    return evaluate_run(run_dir, out=tmp_path_factory.mktemp("whole"), workers=1, **GIVEN)


def test_the_numbers_are_those_of_one_process_and_a_death_changes_none(run_dir, whole, tmp_path, here):
    endings, shards = here
    endings.append(Died(-9))
    result = evaluate_run(run_dir, out=tmp_path, workers=2, engine=SLURM, **GIVEN)
    assert result["checksum"] == whole["checksum"]
    cut = [(shard.attack, shard.batches) for shard in shards]
    expected = [(name, batches) for name in ("pgd-2", "pgd-2-soft") for batches in ((0, 4, 8), (12, 16))]
    assert sorted(cut) == sorted([*expected, expected[0]])  # the one that died came twice
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation-examples.npz", "evaluation.json"]


@pytest.mark.slow
def test_what_is_there_is_not_done_again(run_dir, whole, tmp_path, here):
    endings, shards = here
    endings += [None, KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        evaluate_run(run_dir, out=tmp_path, workers=2, engine=SLURM, **GIVEN)
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / ".evaluation").glob("pgd*.json")}
    assert len(done) == 3
    (tmp_path / ".evaluation" / "pgd-2.4.json").unlink()
    shards.clear()
    seen = {}

    def end(path):
        seen.update({each.name: each.stat().st_mtime_ns for each in path.glob("pgd*.json")})

    endings.clear()
    with pytest.MonkeyPatch.context() as patch:
        from advmoe.evaluation import runs

        collected = runs.save
        patch.setattr(runs, "save", lambda *given: (end(tmp_path / ".evaluation"), collected(*given))[1])
        result = evaluate_run(run_dir, out=tmp_path, workers=2, engine=SLURM, resume=True, **GIVEN)
    assert result["checksum"] == whole["checksum"] and len(shards) == 4 and len(seen) == 10
    assert {name for path, when in done.items() if seen[name := path.name] != when} == {"pgd-2.4.json"}


def test_a_shard_that_is_told_to_stop_goes_on_after_its_last_batch(
    run_dir, whole, tmp_path, here, monkeypatch, capsys
):  # fmt: skip
    put, signals = Journal.put, [2]

    def stopped(journal, task, result):
        put(journal, task, result)
        if task.first == 8 and signals:  # the third batch of the first shard
            signals.clear()
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Journal, "put", stopped)
    result = evaluate_run(run_dir, out=tmp_path, workers=1, engine=SLURM, **GIVEN)
    assert result["checksum"] == whole["checksum"] and len(here[1]) == 3
    assert ": ended by SIGTERM after 2 batches; tried again" in capsys.readouterr().err


def test_the_error_of_a_shard_is_raised_when_all_have_ended(run_dir, tmp_path, here):
    endings, shards = here
    endings.append(InputError("x must be 1, got 2"))
    with pytest.raises(InputError, match=r"^x must be 1, got 2 \(see .*pgd-2\.0-8\..*\.log\)$"):
        evaluate_run(run_dir, out=tmp_path, workers=2, engine=SLURM, **GIVEN)
    assert len(shards) == 4 and len(list((tmp_path / ".evaluation").glob("pgd*.json"))) == 7


def test_a_process_whose_numbers_would_be_others_does_nothing(run_dir, tmp_path, here, monkeypatch):
    from advmoe.evaluation import shards as module

    usual = module.fingerprint
    monkeypatch.setattr(module, "fingerprint", lambda *given: usual(*given) | {"torch": "0.1"})
    with pytest.raises(InputError, match=r"every process of an evaluation must compute as .* \(torch: .*\), got 0.1"):
        evaluate_run(run_dir, out=tmp_path, workers=2, engine=SLURM, **GIVEN)
    assert not list((tmp_path / ".evaluation").glob("pgd*.json"))


def test_a_model_that_no_digest_tells_is_taken_as_it_is():
    require_same({"seed": 0, "model": None}, {"seed": 0, "model": "abc"})
    with pytest.raises(OtherSettings, match=r"\(model: def\), got abc"):
        require_same({"seed": 0, "model": "def"}, {"seed": 0, "model": "abc"})


def test_a_shard_is_called_by_its_batches_and_what_its_numbers_depend_on(tmp_path):
    shard = Shard("autoattack:apgd-ce+square", (0, 250), "0123abcd")
    assert shard.id == "autoattack_apgd-ce_square-94405e0cc35e.0-250.0123abcd"
    assert replace(shard, mark="f").id != shard.id and Ledger(tmp_path).log(shard.id).parent == tmp_path
