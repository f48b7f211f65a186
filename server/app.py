"""The Flower ServerApp. The same object runs in every engine, simulated or deployed."""

from __future__ import annotations

from flwr.app import ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

from fedkn.federation import ARRAYS, CONFIG, METRICS, arrays_record
from server.rounds.membership import count_nodes
from server.run import run_server
from server.run_file import told_run

__all__ = ["app"]

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment of the run config; the final weights are left in the context's state."""
    run = told_run(context.run_id, context.run_config)
    config = run.config
    if not config.partition.clients:
        config = config.for_nodes(count_nodes(grid, config.server.join_timeout))
    outcome = run_server(grid, config, run.advice)
    context.state[ARRAYS] = arrays_record(outcome.tensors)
    context.state[METRICS] = MetricRecord(
        {
            "value": outcome.evaluation.value,
            "loss": outcome.evaluation.loss,
            "examples": outcome.evaluation.examples,
            "rounds": outcome.rounds,
        }
    )
    context.state[CONFIG] = ConfigRecord({"weights-sha256": outcome.weights_sha256})
