"""What the best weights of a run of ours say of every validation image, for accuracy.py.

    python benchmarks/score_ours.py RUN DATA SCORES    # DATA: the packed data set of the run

Not part of what ours is timed for: the others keep what their best evaluation said.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from scores import write_scores

from rtl_dist.data.format.dataset import open_dataset
from rtl_dist.distributed.runtime import Runtime
from rtl_dist.distributed.stopping import StopRequests
from rtl_dist.evaluation.scoring import score_split
from rtl_dist.model.classifier import place
from rtl_dist.model.folder import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", help="a run folder")
    parser.add_argument("data", help="a packed data set")
    parser.add_argument("scores", type=Path, help="--scores of the other methods")
    args = parser.parse_args()
    loaded, dataset = load_model(args.run), open_dataset(args.data)
    split = dataset.split("val")
    with StopRequests() as stops, Runtime(loaded.precision, stops) as runtime:
        place(loaded.model, runtime.device, runtime.dtype)
        predictions = score_split(loaded.model, dataset, split, runtime=runtime, workers=2)
    assert predictions is not None
    assert predictions.scores is not None
    keys = split.keys()  # a key is the sample's number and the stem of its file
    stems = [key.split("_", 1)[1] for key in keys]
    write_scores(args.scores, stems, predictions.scores)


if __name__ == "__main__":
    main()
