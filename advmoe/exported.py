"""An ONNX file that `advmoe export` wrote, as something that predicts: no PyTorch model is made of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from advmoe.errors import InputError, lacking
from advmoe.models.predictions import Picture, predict, require_labels
from advmoe.text import one_line


class ExportedModel:
    """The graph of a file, and what the file says of the model that it was made of (`spec`)."""

    def __init__(self, path: str | Path) -> None:
        """Open `path`. Raises `InputError` for a file damaged or none of ours, or without the extra `export`."""
        try:
            import onnxruntime
        except ImportError as error:
            raise lacking("an ONNX file", "export", error) from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4  # errors are raised
        rule = "be an ONNX file that `advmoe export` wrote"
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            told = self._session.get_modelmeta().custom_metadata_map
            self.spec: dict[str, Any] = json.loads(told["model"])
            self._batch: int | str = json.loads(told["input"])["shape"][0]
            require_labels(self.spec)
        except KeyError as error:
            raise InputError(f"{path} must {rule}, got one without {error.args[0]!r} in its metadata") from None
        except Exception as error:
            raise InputError(f"{path} must {rule}, got {one_line(error)}") from error

    def predict(self, pictures: Picture | Sequence[Picture], *, top: int = 5) -> Any:
        """As `Classifier.predict`."""
        return predict(self._network, self.spec, pictures, top)

    def _network(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        parts = x.split(1) if self._batch == 1 else [x]
        outputs = [self._session.run(None, {"pixels": part.contiguous().numpy()}) for part in parts]
        logits, *pathway = (torch.cat([torch.from_numpy(each) for each in side]) for side in zip(*outputs, strict=True))
        return logits, pathway[0] if pathway else None
