"""Training only a head on a frozen ResNet-18, 15 epochs at 224 px: ours beside three others.

    python benchmarks/head_stage.py --data DIR --weights resnet18.pth [--seeds 0 1 2]

`DIR` holds `train/<class>/` and `val/<class>/`; the weights are a torchvision ResNet-18 state dict.
All sides train 15 epochs and validate after each. They run as processes of their own, in turn, seed
by seed; times are of whole processes, start-up and (ours) packing included. Printed: best
validation top-1, wall and CPU seconds, and what each side costs by what ours costs, as the median
over the seeds and (lowest to highest).

Sides:
  rtl_dist           `rtl-dist pack`, then `head_stage.yaml`: the trunk runs once for each of two
                     views of an image
  plain              `frozen_loop.py`: the trunk under `no_grad` on every image in every epoch
  lightning          `lightning_loop.py`: `BackboneFinetuning` that never unfreezes
  lightning_no_grad  the same script, the trunk under `no_grad`
  fastai             `fastai_loop.py`: `freeze`, then `fit_one_cycle`

rtl_dist, plain and both of Lightning's share optimizer, rate, schedule, batch and crops; fastai has
its own, and a larger head. About 20 minutes a seed on two quiet CPU cores with 1,000 training and
500 validation images of 224 px.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from processes import BENCHMARKS
from sides import (
    Outcome,
    Peer,
    installed,
    print_summary,
    run_ours,
    run_peer,
    take_turns,
    warm_up,
)

PEERS = {
    "plain": Peer(command=("frozen_loop.py",)),
    "lightning": Peer(command=("lightning_loop.py", "--mode", "head"), needs="lightning"),
    "lightning_no_grad": Peer(
        command=("lightning_loop.py", "--mode", "head", "--freeze", "no_grad"), needs="lightning"
    ),
    "fastai": Peer(command=("fastai_loop.py", "--mode", "head"), needs="fastai"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--peers", nargs="*", choices=tuple(PEERS), default=list(PEERS))
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--config", type=Path, default=BENCHMARKS / "head_stage.yaml")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="of our config, such as stages.0"
    )
    arguments = parser.parse_args()
    data, weights, epochs = arguments.data.resolve(), arguments.weights.resolve(), arguments.epochs
    peers = installed(PEERS, arguments.peers)
    warm_up(peers, data)

    def peer_run(peer: Peer, seed: int) -> Outcome:
        return run_peer(peer, data=data, weights=weights, seed=seed, epochs=epochs)

    with tempfile.TemporaryDirectory() as folder:

        def our_run(seed: int) -> Outcome:
            return run_ours(
                arguments.config.resolve(),
                data=data,
                weights=weights,
                seed=seed,
                folder=Path(folder),
                overrides=[f"stages.0.epochs={epochs}", *arguments.set],
            )

        outcomes = take_turns(peers, arguments.seeds, peer_run=peer_run, our_run=our_run)
    print_summary(outcomes)


if __name__ == "__main__":
    main()
