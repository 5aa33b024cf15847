"""`python -m pretrain CONFIG [section.key=value ...]`, alone, under torchrun or under srun."""

import sys

from cairn.cluster import Cluster
from cairn.config.main import read_args, run_main
from cairn.config.schema import PretrainConfig
from cairn.train.signals import leave_at_signal


def main() -> None:
    """Prepare the corpus if needed, train, say where the run is and how to go on."""
    config = read_args(PretrainConfig, sys.argv[1:])

    cluster = Cluster.from_env()
    leave_at_signal(cluster)

    from cairn.data.prepare import open_prepared, prepare
    from cairn.train.language_model import LanguageModel
    from cairn.train.trainer import Trainer

    with cluster.init():
        folder = cluster.on_main(lambda: prepare(config.data, config.tokenizer))
        task = cluster.on_all(lambda: LanguageModel(config, open_prepared(folder)))
        trainer = Trainer(task, config, cluster)
        cluster.on_main(lambda: trainer.folder.keep_tokenizer(task.prepared.tokenizer.save))
        outcome = trainer.run()
        if cluster.is_main:
            print(outcome.summary())


if __name__ == "__main__":
    run_main(main)
