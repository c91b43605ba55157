"""A classification run from its folder's opening to its last file."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext

from mae_transfer.classification.config import ClassificationConfig
from mae_transfer.classification.evaluate import Evaluation
from mae_transfer.classification.knn import run_knn
from mae_transfer.classification.objective import ClassificationRun
from mae_transfer.classification.report import write_report
from mae_transfer.engine.config import read_config, to_dict, to_yaml
from mae_transfer.engine.distribution import Processes, is_restart
from mae_transfer.engine.metrics import MetricsLog, require_wandb
from mae_transfer.engine.run import FREE_ON_RESUME, carry_out, check_same_run
from mae_transfer.engine.run_folder import RunFolder, open_run_folder, run_before
from mae_transfer.errors import ConfigError

# Where images lie and how they are tested does not change what is learned.
_FREE_ON_RESUME = ("data.train", "data.val", "data.eval_crop", "data.class_map", "knn.")


def classify(config: ClassificationConfig, processes: Processes) -> str | None:
    """Run, or continue, one of the protocols to its end.

    Returns:
        None, or the name of the signal that stopped it (the state is saved).

    Raises:
        UserError: anything wrong with config or data, before training starts.
        RunFailed: too many unreadable images or steps that were not finite; the disk full.
    """
    if config.log.wandb is not None:
        require_wandb()
    before = None
    if config.protocol != "knn":
        before = processes.on_main(lambda: run_before(config.run, restarted=is_restart()))
    # First, as a mistake in config or data leaves no folder behind.
    run = ClassificationRun(config, processes, before=before)
    if config.run.resume == "auto" or is_restart():
        processes.on_main(lambda: refuse_another_run(run.config))
    if config.protocol == "knn":
        find_neighbours(run)
        return None
    evaluation = Evaluation(run)
    return carry_out(
        run,
        [evaluation.hook],
        free=_FREE_ON_RESUME,
        # Who is mixed with whom, and whose statistics a probe takes, depends on the micro-batch.
        bound=["train.accumulate"] if run.config.augmentation.mixes or not run.config.trains_encoder else [],
        finish=lambda folder, trainer: write_report(run, folder, evaluation.latest),
    )


def refuse_another_run(config: ClassificationConfig) -> None:
    """Before anything is written to a folder that is used already: a training state says itself which run it is of,
    and the records of a run without one are lost when another takes its folder.

    Raises:
        ConfigError: ``run.dir`` is of another protocol, or of other nearest neighbours.
    """
    folder = RunFolder(config.run.dir)
    if not folder.config.is_file():
        return
    advice = "name another folder, or delete what is there with run.overwrite=true and run.resume=never"
    try:
        before = read_config(ClassificationConfig, folder.config)
    except ConfigError as error:
        raise ConfigError(f"run.dir={folder.root} is not of a run like this one ({error}); {advice}") from error
    if before.protocol != config.protocol:
        raise ConfigError(
            f"run.dir={folder.root} is of a run with protocol={before.protocol}, and this is {config.protocol}; "
            f"{advice}"
        )
    if config.protocol == "knn":
        free = [key for key in FREE_ON_RESUME if key != "init_checkpoint"]
        check_same_run(to_dict(before), config, free=free)


def check_neighbours(ks: Sequence[int], num_images: int) -> None:
    """Raises ConfigError where there are not as many images as neighbours to ask."""
    if max(ks) <= num_images:
        return
    fitting = [k for k in ks if k <= num_images] or [num_images]
    raise ConfigError(
        f"knn.k={list(ks)} asks up to {max(ks)} neighbours, and data.train has {num_images} images; set "
        f"knn.k=[{','.join(map(str, fitting))}], or give more images"
    )


def find_neighbours(run: ClassificationRun) -> None:
    """Nearest neighbours, which train nothing: a run folder with one line of metrics and the report. Done again in its
    own folder, they take the place of those.

    Raises:
        ConfigError: fewer training images than neighbours to ask; a folder that cannot be used.
    """
    config, processes = run.config, run.processes
    check_neighbours(config.knn.k, len(run.source))
    folder, _ = processes.on_main(lambda: open_run_folder(config.run, restarted=is_restart(), trains=False))
    with folder.in_use() if processes.is_main else nullcontext():
        numbers, predictions = run_knn(run)
        write_report(run, folder, predictions)
        if processes.is_main:
            folder.write_description(to_yaml(config))
            log = MetricsLog(
                folder.metrics, last_step=-1, tensorboard=None, wandb=config.log.wandb, config=to_dict(config)
            )
            log.write({"step": 0, "epoch": 0.0, **numbers, "time": time.time()})
            log.close()
