"""Local training, plain and private; evaluation; and the learning-rate schedule."""

from fedkn.training.batches import BatchPlan, plan_batches
from fedkn.training.evaluation import Evaluation, evaluate
from fedkn.training.inputs import Inputs
from fedkn.training.local import LocalTask, LocalUpdate, train_locally
from fedkn.training.optimizer import FlatSGD
from fedkn.training.precision import check_precision, training_scores
from fedkn.training.private import refuse_unprivate, train_privately
from fedkn.training.rule import LocalRule, carried_part
from fedkn.training.schedule import learning_rate
from fedkn.training.workspace import Workspace

__all__ = [
    "BatchPlan",
    "Evaluation",
    "FlatSGD",
    "Inputs",
    "LocalRule",
    "LocalTask",
    "LocalUpdate",
    "Workspace",
    "carried_part",
    "check_precision",
    "evaluate",
    "learning_rate",
    "plan_batches",
    "refuse_unprivate",
    "train_locally",
    "train_privately",
    "training_scores",
]
