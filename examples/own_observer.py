"""Follow a run as it goes: how far each round moves the model, as a file beside the run.

An observer is told on the server what happens. Whatever it does, the run's numbers stay the same.
"""

import numpy as np

import fedkn


class Movement(fedkn.Observer):
    """Writes the distance between the models of one round and the next."""

    def __init__(self, to: str = "movement.csv") -> None:
        self._to = to
        self._before: np.ndarray | None = None

    def evaluation(self, event: fedkn.Event) -> None:
        """Take the model that is evaluated: round 0 is the initial one."""
        model = np.concatenate([value.ravel() for value in event.tensors().values()])
        if self._before is not None:
            moved = float(np.linalg.norm(model - self._before))
            with (event.folder / self._to).open("a") as file:
                file.write(f"{event.cell},{event['round']},{moved}\n")
        self._before = model


if __name__ == "__main__":
    result = fedkn.run(
        normalizer="group",
        rounds=3,
        clients=4,
        cohort=2,
        model={"width": 4},
        train={"local_steps": 4},
        # From another file it could be the class itself: observers=[Movement].
        observers="own_observer:Movement",
        settings={"observers.options.to": "moved.csv"},
    )
    print(result.rounds[["round", "accuracy", "train_loss"]].to_string(index=False))
    print((result.folder / "moved.csv").read_text())
