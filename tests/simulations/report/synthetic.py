"""Made-up run folders, the same for the same arguments: whole ones and every kind of broken one."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedkn.config import ExperimentConfig
from fedkn.seeds import numpy_generator
from fedkn.tasks.metric import Metric
from simulations.runs.folder import RunFolder
from simulations.runs.records import GridRecord, PartitionRecord, partition_label

# Final accuracy and the rounds it takes to get most of the way there.
SKILLS = {
    "kernel": (0.96, 2.0),
    "ws_group": (0.945, 2.5),
    "batch": (0.91, 3.5),
    "group": (0.83, 4.0),
    "layer": (0.78, 4.0),
    "instance": (0.74, 5.0),
    "none": (0.35, 6.0),
}
CLASSES = [f"digit {number}" for number in range(10)]


class Synthetic:
    """Writes one run folder, cell by cell."""

    def __init__(
        self,
        path: Path,
        *,
        normalizers: Sequence[str] = tuple(SKILLS),
        batch_sizes: Sequence[int] = (1, 2, 8),
        seeds: int = 5,
        partitions: Sequence[dict[str, Any]] = ({},),
        rates: Sequence[float] = (),
        rounds: int = 12,
        keepers: Sequence[str] | None = None,
        metric: Metric | None = None,
        classes: int = 0,
        model: dict[str, Any] | None = None,
        **experiment: Any,
    ) -> None:
        """`keepers` keep tensors on the clients; unless None, own models are evaluated.

        `metric`: what decides, beside another one, as a task writes it; its values are those of an
        accuracy, or for one of which lower is better ten times the errors. Without it the lines are
        those from before there were tasks. `classes`: of the confusion matrices, if any. `model`:
        what is told of how the model came about.
        """
        self.rounds = rounds
        self.metric = metric
        self.classes = classes
        self.model = model
        self.keepers = keepers
        self.layers = [{"partition": dict(changes)} for changes in partitions]
        self.experiment = {"rounds": rounds, **experiment}
        configs = [ExperimentConfig.resolve(self.experiment, layer) for layer in self.layers]
        self.grid = GridRecord(
            name=path.name,
            command=f"fedkn compare --name {path.name} --seeds {seeds}",
            normalizers=list(normalizers),
            batch_sizes=list(batch_sizes),
            partitions=[partition_label(config.partition) for config in configs],
            seeds=list(range(seeds)),
            learning_rates=list(rates) or [0.05],
            search={"seeds": 1, "rounds": rounds} if rates else {},
            experiment=dict(configs[0].flat()),
        )
        self.folder = RunFolder.create(path, self.grid)

    def write_extras(self) -> None:
        """The partition tables and the environment."""
        tables = []
        for layer, label in zip(self.layers, self.grid.partitions, strict=True):
            clients = ExperimentConfig.resolve(layer).partition.clients
            for seed in self.grid.seeds:
                generator = numpy_generator(seed, "partition", label)
                shares = generator.dirichlet([0.3] * len(CLASSES), size=clients)
                counts = (shares * generator.integers(30, 90, size=(clients, 1))).astype(int)
                tables.append(PartitionRecord(label, seed, CLASSES, counts.tolist()))
        self.folder.write_partitions(tables)
        self.folder.write_environment(
            {"python": "3.11.9", "torch": "2.13.0", "machine": {"cores": 2, "memory_gb": 8}}
        )

    def write_cells(self) -> None:
        """Every result cell of the grid, completed; BatchNorm at batch 1 untrainable."""
        for layer in range(len(self.layers)):
            for name in self.grid.normalizers:
                for size in self.grid.batch_sizes:
                    for seed in self.grid.seeds:
                        if name == "batch" and size == 1:
                            self.untrainable(name, size, seed, layer)
                        else:
                            self.cell(name, size, seed, layer)

    def write_search(self) -> None:
        """One search cell per learning rate; the best is 0.05 or nearest to it."""
        for name in self.grid.normalizers:
            for size in self.grid.batch_sizes:
                for rate in self.grid.learning_rates:
                    loss = 0.03 * abs(np.log(rate / 0.05))
                    self.cell(name, size, 1000, rate=rate, purpose="search", handicap=loss)

    def cell(
        self,
        name: str,
        size: int,
        seed: int,
        layer: int = 0,
        *,
        rate: float = 0.05,
        purpose: str = "result",
        handicap: float = 0.0,
        until: int | None = None,
        end: dict[str, Any] | None = None,
        **changes: Any,
    ) -> None:
        """One cell, with rounds up to `until`; `changes` are fields of its last round."""
        split = "test" if purpose == "result" else "validation"
        config = self.config(name, size, seed, layer=layer, rate=rate, split=split)
        cell = f"{purpose}-{name}-b{size}-p{layer}-lr{rate:g}-s{seed}"
        generator = numpy_generator(seed, name, size, layer, rate)
        lines: list[dict[str, Any]] = [
            {
                "kind": "start",
                "time": 0.0,
                "purpose": purpose,
                "config": config.flat(),
                "parameters": 78_042,
                "tensors": 28,
                **self.task(),
                **({"model": self.model} if self.model else {}),
            }
        ]
        best, pace = SKILLS.get(name, (0.8, 4.0))
        # The same luck for every normalizer of a seed: what pairing takes out.
        best += 0.015 * numpy_generator(seed, "luck").standard_normal() - handicap
        best += 0.006 * generator.standard_normal() + 0.01 * np.log2(size) * (name == "batch")
        lines.append(self.evaluation(0, 0.1, split))
        keeps = name in (self.keepers or ())
        if keeps:
            lines[0]["local_tensors"] = 12
        last = self.rounds if until is None else until
        for number in range(1, last + 1):
            accuracy = 0.1 + (best - 0.1) * (1 - np.exp(-number / pace))
            accuracy += 0.01 * generator.standard_normal() - 0.3 * keeps
            record = self.round(number, size, accuracy, generator)
            lines.append(record | (changes if number == last else {}))
            lines.append(self.evaluation(number, float(np.clip(accuracy, 0, 1)), split))
        lines.append({"kind": "memory", "peak_bytes": 180_000 * size, "batch_size": size})
        if until is None and self.keepers is not None:
            lines.append(self.client_evaluation(best, split, generator))
        if until is None:
            completed = {"status": "completed", "seconds": 10.0, "weights_sha256": "0" * 64}
            lines.append({"kind": "end", **(end or completed)})
        elif end:
            lines.append({"kind": "end", **end})
        self.append(*({"cell": cell, **line} for line in lines))

    def untrainable(self, name: str, size: int, seed: int, layer: int = 0) -> None:
        """A cell that ended without starting."""
        cell = f"result-{name}-b{size}-p{layer}-s{seed}"
        self.folder.write_cell_config(
            cell, self.config(name, size, seed, layer=layer, rate=0.05, split="test")
        )
        error = f"normalizer '{name}' needs a batch size of 2 or more"
        self.append({"cell": cell, "kind": "end", "status": "untrainable", "error": error})

    def config(
        self, name: str, size: int, seed: int, *, layer: int, rate: float, split: str
    ) -> ExperimentConfig:
        return ExperimentConfig.resolve(
            self.experiment,
            self.layers[layer],
            {
                "seed": seed,
                "normalizer.name": name,
                "train.batch_size": size,
                "train.learning_rate": rate,
                "evaluation.split": split,
            },
        )

    def append(self, *lines: dict[str, Any]) -> None:
        with self.folder.metrics_path.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    def task(self) -> dict[str, Any]:
        """What the start of a cell tells of its task."""
        if self.metric is None:
            return {}
        of = self.metric
        ends = {"lowest": of.lowest, "highest": of.highest}
        return {
            "task": {
                "name": "made up",
                "metric": of.name,
                "higher_is_better": of.higher_is_better,
                **{name: end if np.isfinite(end) else None for name, end in ends.items()},
                "unit": of.unit,
            }
        }

    def value(self, accuracy: float) -> float:
        """The deciding metric's value where an accuracy would be `accuracy`."""
        lower = self.metric is not None and not self.metric.higher_is_better
        return 10 * (1 - accuracy) if lower else accuracy

    def evaluation(self, number: int, accuracy: float, split: str) -> dict[str, Any]:
        line = {
            "kind": "evaluation",
            "round": number,
            "split": split,
            "loss": 1 - accuracy,
            "examples": 360,
        }
        if self.metric is None:
            return line | {"accuracy": accuracy}
        line["metrics"] = {self.metric.name: self.value(accuracy), "other": 3 * accuracy}
        if self.classes and number == self.rounds:
            line["confusion"] = self.confusion(accuracy).tolist()
        return line

    def confusion(self, accuracy: float) -> NDArray[np.int64]:
        """About as many right as `accuracy` says; the last class is taken for the one before it."""
        examples = np.full(self.classes, 36)
        right = np.floor(examples * accuracy).astype(int)
        right[-1] = 0
        table = np.diag(right)
        table[np.arange(self.classes), np.arange(self.classes) - 1] += examples - right
        return table

    def client_evaluation(
        self, mean: float, split: str, generator: np.random.Generator
    ) -> dict[str, Any]:
        """Twenty clients of fifty images each; the last keeps no image."""
        correct = generator.binomial(50, np.clip(generator.normal(mean, 0.1, size=19), 0, 1))
        accuracies = np.sort(correct) / 50
        return {
            "kind": "client_evaluation",
            "round": self.rounds,
            "split": split,
            "mean": float(accuracies.mean()),
            "worst_tenth": float(accuracies[0]),
            "deviation": float(accuracies.std()),
            "loss": 0.5,
            "clients": [
                {"client": client, "examples": 50, "correct": int(count), "loss": 0.5}
                for client, count in enumerate(correct)
            ],
            "failed": [{"client": 19, "reason": "keeps no image"}],
        }

    def round(
        self, number: int, size: int, accuracy: float, generator: np.random.Generator
    ) -> dict[str, Any]:
        steps = 5 * 60 // size
        return {
            "kind": "round",
            "round": number,
            "seconds": 1.0,
            "cohort": [0, 3, 4, 7, 11],
            "updates": 5,
            "examples": 300,
            "steps": steps,
            "skipped_batches": 0,
            "skipped_examples": 0,
            "refused": [],
            "failed": [],
            "train_loss": 1 - accuracy,
            "bytes_down": 1_561_840,
            "bytes_up": 1_563_100,
            "train_seconds": steps * (0.004 + 0.0005 * size) * generator.uniform(0.9, 1.1),
            "learning_rate": 0.05,
        }
