"""The model card: what a run directory's files say about its model, for people and (front matter) for the Hub.

What no file records, the card calls unknown.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import yaml

from advmoe.config import Config, TrainingConfig
from advmoe.documents import MOST_JSON, parse_object, read_text
from advmoe.errors import InputError
from advmoe.evaluation.intervals import wilson
from advmoe.rundir import CONFIG, EVALUATION, MANIFEST, MASKS, require_plain, stale, unsealed
from advmoe.tables import DATASETS, METHODS
from advmoe.text import few, macs_unit, passes, percent, radius

_OPTIONS = (
    "alternation", "attack_routing", "balance", "margin", "radius", "runner_up", "ema", "awp", "objective", "schedule",
    "warmup_epochs", "optimizer", "decay", "router_lr", "router_momentum", "router_weight_decay", "clip",
    "label_smoothing", "attack_start", "attack_loss", "first_attack_steps", "first_image_sizes", "finetune_lr",
    "frozen_norms",
)  # fmt: skip
"""Fields of a run's training that the line on its method does not tell."""

RECORDED = (CONFIG, MANIFEST, EVALUATION, MASKS)
"""The files of a run directory that a card tells of, and that travel with the weights."""


@dataclass(frozen=True)
class Record:
    """What a run directory says about its model; None where it says nothing."""

    config: Config | None = None
    manifest: Mapping[str, Any] | None = None
    evaluation: Mapping[str, Any] | None = None
    note: str | None = None
    """Why the evaluation that lies there is left out."""
    texts: Mapping[str, str] = field(default_factory=dict)
    """The files that say it, by name."""

    @staticmethod
    def read(run: Path, digest: str | None = None) -> Record:
        """The record in `run` of the model with this digest; an evaluation of another model is left out.

        Any file may be missing. Raises `ValueError`, which names the file, for a damaged one.
        """
        require_plain(run)
        texts = {}
        for name in RECORDED:
            if (path := run / name).is_file():
                texts[name] = read_text(path, MOST_JSON, "text")
        config = Config.load(run / CONFIG) if CONFIG in texts else None
        if config is not None and _without_places(config):
            texts[CONFIG] = config.to_yaml()
        manifest = _json(run / MANIFEST, texts.get(MANIFEST))
        command = manifest.get("command") if manifest is not None else None
        if isinstance(command, list) and (words := [portable(str(word)) for word in command]) != command:
            manifest = {**(manifest or {}), "command": words}
            texts[MANIFEST] = json.dumps(manifest, indent=2) + "\n"
        evaluation, note = _json(run / EVALUATION, texts.get(EVALUATION)), None
        if evaluation is not None:
            evaluation = unsealed(evaluation, str(run / EVALUATION))
            _check_evaluation(evaluation, run / EVALUATION)
        if evaluation is not None and stale(evaluation, digest):
            evaluation, note = None, "The evaluation beside the run is of other weights than these."
            del texts[EVALUATION]
        return Record(config, manifest, evaluation, note, texts)


def _without_places(config: Config) -> bool:
    """Cut the folders of this machine off the paths in `config`; whether there were any."""
    changed = False
    of_training = [("training", name) for name in ("init_from", "teacher", "teacher_weights")]
    for group, name in (("data", "root"), *of_training, ("model", "source")):
        value = getattr(getattr(config, group), name)
        if value is not None and (short := portable(value)) != value:
            setattr(getattr(config, group), name, short)
            changed = True
    return changed


def portable(word: str) -> str:
    """A word of a command line; of a path that begins at a root or at home, its last part."""
    option, equals, value = word.rpartition("=")
    local = PurePath(value).is_absolute() or value.startswith("~")
    return f"{option}{equals}{PurePath(value).name}" if local else word


def _json(path: Path, text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    return parse_object(text, str(path))


def _check_evaluation(evaluation: Mapping[str, Any], path: Path) -> None:
    """Raise `ValueError` for an evaluation without its numbers: a card must not call a damaged file unevaluated."""
    robust, threat, number = evaluation.get("robust_accuracy"), evaluation.get("threat"), evaluation.get("num_examples")
    accuracies = [evaluation.get("clean_accuracy"), evaluation.get("worst_case")]
    accuracies += robust.values() if isinstance(robust, dict) else [None]
    sound = all(isinstance(value, int | float) and 0 <= value <= 1 for value in accuracies)
    sound = sound and isinstance(threat, dict) and {"norm", "eps"} <= set(threat)
    if not (sound and isinstance(number, int) and number >= 1):
        fields = "clean_accuracy, robust_accuracy, worst_case (fractions), num_examples and threat"
        raise InputError(f"{path} must hold {fields}, got one without")


def model_card(
    spec: Mapping[str, Any], record: Record, *, name: str, repo_id: str | None = None, license: str | None = None
) -> str:
    """The text of `README.md`: YAML front matter, then Markdown.

    Args:
        spec: the model's. name: what it is called. repo_id: the repository to load it from, if any.
        license: of the weights; None is written as `unknown`.
    """
    front = yaml.safe_dump(_front_matter(spec, record, name, license), sort_keys=False, allow_unicode=True, width=120)
    sections = [f"# {name}", _summary(spec, record), _loading(spec, repo_id), _data(spec, record), _training(record)]
    sections += [_robustness(record), _cost(record), _configuration(record)]
    return f"---\n{front}---\n\n" + "\n\n".join(sections) + "\n"


# Front matter


def _front_matter(spec: Mapping[str, Any], record: Record, name: str, license: str | None) -> dict[str, Any]:
    tags = ["advmoe", "adversarial-robustness", str(spec["name"])]
    tags += ["mixture-of-experts"] if spec["kind"] == "moe" else []
    front: dict[str, Any] = {
        "license": license or "unknown",
        "library_name": "advmoe",
        "pipeline_tag": "image-classification",
        "tags": tags,
    }
    if record.config is not None and (known := DATASETS[record.config.data.name].hub) is not None:
        front["datasets"] = [known]
    if record.evaluation is not None:
        front |= {"metrics": ["accuracy"], "model-index": [{"name": name, "results": [_result(record.evaluation)]}]}
    return front


def _result(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The evaluation as the Hub's `model-index` has it: fractions."""
    data = evaluation.get("data", {})
    source = str(data.get("name", "unknown"))
    threat = _threat(evaluation["threat"])
    named = {"clean accuracy": evaluation["clean_accuracy"]}
    named |= {f"robust accuracy, {attack}, {threat}": v for attack, v in evaluation["robust_accuracy"].items()}
    named[f"robust accuracy, worst case, {threat}"] = evaluation["worst_case"]
    metrics = [{"type": "accuracy", "name": key, "value": round(float(value), 6)} for key, value in named.items()]
    known = DATASETS[source].hub or source if source in DATASETS else source
    dataset = {"name": source, "type": known, "split": str(data.get("split", "test"))}
    return {
        "task": {"type": "image-classification", "name": "Image Classification"},
        "dataset": dataset,
        "metrics": metrics,
    }


# Markdown


def _threat(threat: Mapping[str, Any]) -> str:
    """A threat model as in `linf 8/255`."""
    return f"{threat['norm']} {radius(float(threat['eps']), threat['norm'])}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _summary(spec: Mapping[str, Any], record: Record) -> str:
    names = f" ({few(map(str, spec['classes']), 10)})" if spec.get("classes") else ""
    lines = [f"An image classifier: {_architecture(spec)}, for {spec['num_classes']} classes{names}"]
    lines.append(f" of images of {spec['in_channels']}x{spec['input_size']}x{spec['input_size']}")
    if record.config is not None:
        lines.append(f", trained by `{record.config.training.method}` on `{record.config.data.name}`")
    return "".join([*lines, ", made with `advmoe`."])


def _architecture(spec: Mapping[str, Any]) -> str:
    name, kind = f"`{spec['name']}`", spec["kind"]
    if "source" in spec:  # no backbone of ours
        experts = f", converted: {spec['num_experts']} experts in each of its MoE layers" if "layers" in spec else ""
        return f"{name}, a network of its author's own{experts}"
    if kind == "dense":
        return f"{name}, dense"
    if kind == "s-dense":
        return f"{name} at {spec['scale']:g} of its width (S-Dense)"
    if kind == "sparse":
        return f"{name} pruned to {spec['scale']:g} of every layer's channels (Sparse-CNN)"
    choice = "token" if spec.get("route_per") == "token" else "image"
    return (
        f"{name} as a mixture of experts: {spec['num_experts']} experts a layer, of which each {choice} uses one, at "
        f"{spec['scale']:g} of the backbone's width; `{spec['router']}` router, `{spec['experts']}` experts"
    )


def _loading(spec: Mapping[str, Any], repo_id: str | None) -> str:
    place, side = repo_id or "path/to/this/folder", spec["input_size"]
    code = ', source="FILE.py:FACTORY"' if "source" in spec else ""
    lines = [
        "## How to load it",
        "",
        "```python",
        "from advmoe import from_pretrained",
        "",
        f'model = from_pretrained("{place}"{code})  # in eval mode',
        f"logits = model(x)  # x: (N, {spec['in_channels']}, {side}, {side}), pixels in [0, 1]",
        "```",
        "",
        "Weights are safetensors and their description is JSON: loading runs no code from here and unpickles nothing.",
    ]
    if code:
        lines.append("The network's own code does not travel with its weights: name yours as `source`.")
    if repo_id is not None:
        lines.append(
            "From the Hub it needs `pip install 'advmoe[hub]'`. To measure it: "
            f"`hf download {repo_id} --local-dir runs/model`, then `advmoe evaluate runs/model`."
        )
    return "\n".join(lines)


def _data(spec: Mapping[str, Any], record: Record) -> str:
    if record.config is None:
        return "## Data\n\nUnknown: this model came without a run's settings."
    data = record.config.data
    size = "their own size" if spec["input_size"] is None else f"{spec['input_size']} pixels a side"
    where = f", read from `{data.root}`" if data.name == "folder" else ""
    augmented = "augmented" if data.augment else "not augmented"
    share = f"{100 * data.val_fraction:g}% of the training set held out to choose the best checkpoint"
    drawn = f"{data.train_examples} of its training images; " if data.train_examples is not None else ""
    left_out = (record.manifest or {}).get("data_notes")
    notes = [f"- {_code(str(note))}" for note in left_out] if isinstance(left_out, list) else []
    told = "\n".join(["", "", "What was not used:", "", *notes]) if notes else ""
    return f"## Data\n\n`{data.name}`{where}; {drawn}images of {size}, {augmented}; {share}.{told}"


def _code(text: str) -> str:
    """Text shown as it is, on one line: names of files may hold what Markdown reads otherwise."""
    return f"`{' '.join(text.split()).replace('`', chr(39))}`"


def _training(record: Record) -> str:
    lines = ["## Training and threat model", ""]
    config, manifest = record.config, record.manifest
    if config is None:
        lines.append("Unknown: this model came without a run's settings.")
    else:
        t, threat = config.training, config.threat
        trades = t.objective == "trades"
        sentence = METHODS[t.method].sentence if trades else METHODS[t.method].sentence.replace("TRADES", "PGD-AT")
        lines.append(f"- Method `{t.method}`: {sentence}.")
        if METHODS[t.method].adversarial:
            steps = "1 step" if t.warm else f"{t.attack_steps} steps"
            beta = f", beta {t.beta:g}" if trades and not t.teacher else ""
            inner = f"inner attack of {steps} of {t.step_size}{beta}"
            lines.append(f"- Threat model in training: {threat.norm}, eps {threat.eps} (pixels in [0, 1]); {inner}.")
        if t.teacher is not None:
            rslad = f"[RSLAD](https://arxiv.org/abs/2108.07969), weight {t.distill_weight:.3g}"
            lines.append(
                f"- Taught by {_code(t.teacher)}: its soft labels in the place of classes and TRADES ({rslad})."
            )
        usual = TrainingConfig(alternation="both" if t.method == "advmoe" else t.alternation)  # the paper's
        chosen = [f"{each} {getattr(t, each)}" for each in _OPTIONS if getattr(t, each) != getattr(usual, each)]
        if chosen:
            lines.append(f"- Options: {', '.join(chosen)}.")
        rate = f"learning rate {t.lr:g}, momentum {t.momentum:g}, weight decay {t.weight_decay:g}"
        epochs = f"{t.epochs} epochs"
        if t.method == "sparse":
            epochs = f"epochs: {', '.join(f'{number} {phase}' for phase, number in t.phase_epochs().items())}"
        lines.append(f"- {epochs}, batch {t.batch_size}, {rate}, {t.precision}, seed {t.seed}.")
    if manifest is not None:
        lines += _provenance(manifest)
    return "\n".join(lines)


def _provenance(manifest: Mapping[str, Any]) -> list[str]:
    versions = manifest.get("versions") or {}
    where = f"{manifest.get('devices', '?')} x {manifest.get('device', '?')} ({manifest.get('cpu', '?')})"
    known = ", ".join(f"{name} {versions[name]}" for name in ("advmoe", "torch", "python") if versions.get(name))
    commit = f"; code at `{manifest['git_commit']}`" if manifest.get("git_commit") else ""
    lines = [f"- Made on {where} with {known or 'unknown versions'}{commit}."]
    if manifest.get("finished"):
        lines.append(f"- Finished {manifest['finished']}, after {manifest.get('wall_seconds', 0):,.0f} s of training.")
    else:
        lines.append("- **Training had not finished** when this was saved.")
    return lines


def _robustness(record: Record) -> str:
    evaluation = record.evaluation
    if evaluation is None:
        reason = record.note or "No evaluation of this model is recorded."
        unknown = "Neither its clean nor its robust accuracy is known."
        return f"## Accuracy and robustness\n\n**Not evaluated.** {reason} {unknown}"
    data, threat = evaluation.get("data", {}), _threat(evaluation["threat"])
    reports, number = evaluation.get("attacks", {}), int(evaluation["num_examples"])
    images: Mapping[str, int] = evaluation.get("images", {})
    count = "the images in the table," if images else f"{number:,} images"
    count += f" of `{data.get('name', 'unknown')}` ({data.get('split', 'test')})"
    named = {"clean": ("none (clean, SA)", evaluation["clean_accuracy"])}
    named |= {name: (f"{name} (RA)", value) for name, value in evaluation["robust_accuracy"].items()}
    named[""] = "worst case over all of them", evaluation["worst_case"]
    rows = []
    for name, (title, value) in named.items():
        of = images.get(name, number)
        rows.append([title, percent(value), _interval(value, of), *([f"{of:,}"] if images else [])])
    lines = [
        "## Accuracy and robustness",
        "",
        f"Measured on {count}, threat model {threat}; an image counts as robust in the worst case only if every attack "
        "failed on it.",
        "",
        _table(["attack", "accuracy, %", "95% interval (Wilson)", *(["images"] if images else [])], rows),
        "",
    ]
    if evaluation.get("masking_gap") is not None:
        gap = f"{100 * evaluation['masking_gap']:.1f} points"
        on = f", both on the {number:,} images" if images else ""
        what = f"- Masking gap (straight-through PGD less the worst case{on}): {gap}."
        lines.append(f"{what} {passes(evaluation)}".rstrip())
    lines += _attack_settings(evaluation)
    lines += [f"- `{name}` was skipped: {r['skipped']}." for name, r in reports.items() if "skipped" in r]
    lines += _flags(evaluation, reports)
    lines += [
        f"- A check made before attacking failed: {check.get('name')}."
        for check in evaluation.get("checks", [])
        if not check.get("passed")
    ]
    return "\n".join(lines)


def _attack_settings(evaluation: Mapping[str, Any]) -> list[str]:
    """What the attacks were given, which may be other than the configuration's."""
    given = evaluation.get("attack")
    settings = {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else {}
    settings.pop("batch_size", None)  # which changes no result
    if isinstance(size := settings.get("step_size"), int | float):
        settings["step_size"] = radius(size, str(evaluation["threat"]["norm"]))
    told = ", ".join(f"{name} {value}" for name, value in settings.items())
    return [f"- Settings of these attacks: {told}."] if told else []


def _interval(share: float, number: int) -> str:
    """The 95% interval of an accuracy of `number` images, which its count of right ones gives."""
    low, high = wilson(round(share * number), number)
    return f"{percent(low)} to {percent(high)}"


def _flags(evaluation: Mapping[str, Any], reports: Mapping[str, Any]) -> list[str]:
    """AutoAttack's warnings: raised, none, or no AutoAttack."""
    run = [name for name in evaluation["robust_accuracy"] if name.startswith("autoattack")]
    if not run:
        return ["- AutoAttack was not run: these figures are upper bounds that a stronger attack may lower."]
    lines = []
    for name in run:
        flags = reports.get(name, {}).get("flags", {})
        lines += [f"- AutoAttack's flag (`{name}`): {flag}" for flag in flags]
        if not flags:
            lines.append(f"- AutoAttack (`{name}`) raised no flag.")
    return lines


def _cost(record: Record) -> str:
    cost = (record.evaluation or {}).get("cost")
    if not cost:
        return "## Cost\n\nNot measured."
    threads = cost.get("threads", "?")
    setting = f"batch {cost.get('batch', '?')}, {cost.get('device', '?')}, {threads} thread{'s' * (threads != 1)}"
    setting += f", {cost['precision']}" if "precision" in cost else ""
    unit, factor = macs_unit([cost.get("gmacs")])
    if "gmacs" in cost:
        cost = {**cost, "gmacs": cost["gmacs"] * factor}
    what = {
        "gmacs": (f"{unit} of one image's pathway, routers included", ".4g"),
        "parameters": ("parameters stored", ","),
        "active_parameters": ("parameters that one image uses", ","),
        "ms_per_image": (f"ms per image ({setting})", ".4g"),
    }
    rows = [[label, format(cost[key], form)] for key, (label, form) in what.items() if key in cost]
    return "## Cost\n\n" + _table(["what", "value"], rows)


def _configuration(record: Record) -> str:
    text = record.texts.get(CONFIG)
    shown = "Unknown." if text is None else f"```yaml\n{text.rstrip()}\n```"
    return f"## Configuration\n\n{shown}"
