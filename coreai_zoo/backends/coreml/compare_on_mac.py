"""Run this bundle's package on a Mac and compare its logits with those of the reference interpreter.

    pip install coremltools numpy
    python compare_on_mac.py

`zoo gate` stores what it compares with in gate/. The package is fed one token per call, its states carried in an
MLState, as an app would. Needs macOS 15 or later.
"""

import json
import sys
from pathlib import Path

import coremltools as ct
import numpy as np

HERE = Path(__file__).parent


def main() -> int:
    """Print the comparison of each prompt; 1 when a confident token differs."""
    stored = sorted((HERE / "gate").glob("logits-*.npz"))
    if not stored:
        print("There is nothing to compare with: run `zoo gate` on this bundle first.")
        return 1
    (package,) = HERE.glob("*.mlpackage")
    (function,) = json.loads((HERE / "build.json").read_text(encoding="utf-8"))["functions"].values()
    inputs = {tensor["name"]: tensor["holds"] for tensor in function["inputs"]}
    output = function["outputs"][0]["name"]
    model = ct.models.MLModel(str(package))
    failed = False
    for path in stored:
        expected = np.load(path)
        state = model.make_state()
        found = []
        for position, token in enumerate(expected["tokens"]):
            values = {"tokens": token, "new_positions": position}
            given = {name: np.array([[values[held]]], np.int32) for name, held in inputs.items()}
            found.append(model.predict(given, state=state)[output][0, -1].astype(np.float32))
        logits, reference = np.stack(found), expected["logits"].astype(np.float32)
        spread = reference.max(-1) - reference.min(-1)
        error = np.abs(logits - reference).max(-1) / spread
        second, first = np.sort(reference, axis=-1)[:, -2:].T
        flips = (logits.argmax(-1) != reference.argmax(-1)) & (first - second >= 0.1)
        failed |= bool(flips.any())
        print(
            f"{path.stem}: {len(found)} positions, largest error {error.max():.2%} of the spread of the logits, "
            f"{int(flips.sum())} confident tokens differ"
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
