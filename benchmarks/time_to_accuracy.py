r"""Time until a validation accuracy is reached by fine-tuning a ResNet-18, beside three others.

    python benchmarks/time_to_accuracy.py --data DIR --weights resnet18.pth \
        --config configs/hymenoptera.yaml --targets 0.85 0.88 0.90 [--seeds 0 1 2]

`DIR` holds `train/<class>/` and `val/<class>/`; the weights are a torchvision ResNet-18 state dict.
For a tenth of Imagenette take `--config benchmarks/imagenette_mini.yaml --targets 0.90 0.93 0.94`.
The sides run as processes of their own, in turn, seed by seed. Printed for each: best validation
top-1, wall and CPU seconds of the whole run, and the seconds, from the start of its first process
(start-up and, on our side, packing included), to the end of the first validation that found the
target; ratios are of the seeds in which both reached it.

The first of many validations to exceed a target is partly luck, and the sides do not validate
equally often (their number is printed): a side that validates more often has more chances, and
pays for them in time.

Sides:
  rtl_dist   `rtl-dist pack`, then `--config`
  tutorial   `tutorial_loop.py`: the loop of PyTorch's transfer-learning tutorial, 15 epochs
  lightning  `lightning_loop.py`: `BackboneFinetuning`, the head first, from epoch 5 of 15 all
  fastai     `fastai_loop.py`: `fine_tune(epochs)`, one frozen epoch first

About 12 minutes a seed on two quiet CPU cores for hymenoptera, 30 for a tenth of Imagenette.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from sides import (
    Outcome,
    Peer,
    installed,
    print_summary,
    print_times_to,
    run_ours,
    run_peer,
    take_turns,
    warm_up,
)

PEERS = {
    "tutorial": Peer(command=("tutorial_loop.py", "--mode", "finetune")),
    "lightning": Peer(command=("lightning_loop.py", "--mode", "finetune"), needs="lightning"),
    "fastai": Peer(command=("fastai_loop.py", "--mode", "finetune"), needs="fastai"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--config", type=Path, required=True, help="ours")
    parser.add_argument("--targets", type=float, nargs="+", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--peers", nargs="*", choices=tuple(PEERS), default=list(PEERS))
    parser.add_argument("--epochs", type=int, help="of the peers (default: each script's)")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of our config")
    arguments = parser.parse_args()
    data, weights = arguments.data.resolve(), arguments.weights.resolve()
    peers = installed(PEERS, arguments.peers)
    warm_up(peers, data)

    def peer_run(peer: Peer, seed: int) -> Outcome:
        return run_peer(peer, data=data, weights=weights, seed=seed, epochs=arguments.epochs)

    with tempfile.TemporaryDirectory() as folder:

        def our_run(seed: int) -> Outcome:
            return run_ours(
                arguments.config.resolve(),
                data=data,
                weights=weights,
                seed=seed,
                folder=Path(folder),
                overrides=arguments.set,
            )

        outcomes = take_turns(peers, arguments.seeds, peer_run=peer_run, our_run=our_run)
    print_summary(outcomes)
    print_times_to(outcomes, arguments.targets)


if __name__ == "__main__":
    main()
