"""What a run is: typed, validated settings. Imports no torch, so that the command line answers at once.

Pixels lie in [0, 1] and every strength (`eps`, `step_size`) is in the same unit; `8/255` may be written as such.
Whatever is wrong with a value is a `ValueError` of one line that names the field, the rule and the value received.
"""

from advmoe.config.config import Config, field_names, file_digest, merged, near_matches, overlaid, read_yaml
from advmoe.config.fields import (
    Accelerator,
    Batch,
    Channels,
    Classes,
    Codes,
    Compute,
    Count,
    ExpertInit,
    ExpertLayout,
    Experts,
    Hours,
    ModelKind,
    Pixels,
    Precision,
    Processes,
    RoutePer,
    RouterKind,
    RouterNorm,
    Seed,
    Share,
    Side,
    Threads,
    Width,
    Within,
    is_source,
    require,
    require_one_of,
    require_path,
    require_text,
    typed,
)
from advmoe.config.network import OWN_MODEL, ModelConfig
from advmoe.config.sections import (
    AttackConfig,
    DataConfig,
    ThreatConfig,
    TrainingConfig,
)

__all__ = [
    "OWN_MODEL", "Accelerator", "AttackConfig", "Batch", "Channels", "Classes", "Codes", "Compute", "Config",
    "Count", "DataConfig", "ExpertInit", "ExpertLayout", "Experts", "Hours", "ModelConfig", "ModelKind", "Pixels",
    "Precision", "Processes", "RoutePer", "RouterKind", "RouterNorm", "Seed", "Share", "Side", "Threads",
    "ThreatConfig", "TrainingConfig", "Width", "Within", "field_names", "file_digest", "is_source", "merged",
    "near_matches", "overlaid", "read_yaml", "require", "require_one_of", "require_path", "require_text", "typed",
]  # fmt: skip
