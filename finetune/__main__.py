"""`python -m finetune CONFIG [section.key=value ...]`, alone, under torchrun or under srun."""

import sys

from cairn.cluster import Cluster
from cairn.config.main import Parser, read_options, run_main
from cairn.config.schema import FinetuneConfig
from cairn.train.signals import leave_at_signal


def main() -> int | None:
    """Train a task, say how good it is; with --seeds once a seed, with mean and deviation."""
    parser = Parser(prog="python -m finetune")
    parser.add_argument("--seeds", metavar="S1,S2", help="train once with each of these seeds, as runs NAME-sSEED")
    config, args = read_options(FinetuneConfig, sys.argv[1:], parser)

    cluster = Cluster.from_env()
    leave_at_signal(cluster)

    from finetune.seeds import read_seeds, summary, train_seed

    seeds = cluster.on_all(lambda: read_seeds(args.seeds, config.seed))
    outcomes = {}
    with cluster.init():
        for seed in seeds:
            outcome = train_seed(config, seed, cluster, several=len(seeds) > 1)
            if cluster.is_main:
                print(outcome.summary(), flush=True)
            if outcome.stopped_by:
                return None
            outcomes[seed] = outcome
        if len(seeds) > 1 and cluster.is_main:
            summary(outcomes)
    return None


if __name__ == "__main__":
    run_main(main)
