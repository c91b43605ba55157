"""What a classification run will take, from a few real steps."""

from __future__ import annotations

from mae_transfer.classification.config import ClassificationConfig
from mae_transfer.classification.evaluate import Evaluation
from mae_transfer.classification.objective import ClassificationRun
from mae_transfer.engine.distribution import Processes
from mae_transfer.engine.rehearsal import parameter_counts, parameter_table, rehearse
from mae_transfer.errors import ConfigError


def dry_run(config: ClassificationConfig, processes: Processes) -> str:
    """Take a few real steps, and the evaluation once, and report. Nothing is written to ``run.dir``.

    Raises:
        UserError: whatever the real run would refuse before it starts, but for what is in ``run.dir``.
    """
    if config.protocol == "knn":
        raise ConfigError("protocol=knn takes no steps: there is nothing to rehearse; start it")
    run = ClassificationRun(config, processes)
    seen = rehearse(run, lambda folder: [Evaluation(run).hook])
    protocol = run.config.protocol
    if protocol == "partial":
        protocol += f", the last {run.config.layers:g} of {run.model.depth} blocks"
    lines = [
        parameter_table(run.model),
        "",
        f"model            {run.config.model.size}, {parameter_counts(run.model)}; {protocol}",
        f"work             {run.sample_flops / 1e9:.3g} GFLOP an image by formula (forward and backward)",
        seen.data(),
        f"classes          {len(run.classes)}; {len(run.val_source)} images to test on",
        seen.step(),
        seen.waiting(),
        seen.memory(),
        seen.projected(),
    ]
    return "\n".join(lines)
