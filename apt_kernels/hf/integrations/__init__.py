"""Support for other libraries. Each integration subscribes here, in the order in which it is called."""

from .. import events
from .continuous_batching import ContinuousBatching
from .distributed import Distributed
from .gradient_checkpointing import GradientCheckpointing
from .learning_rate import join_trainer
from .offloading import Offloading
from .packing import Packing
from .peft import Peft
from .rows import RowAdapters
from .sentence_transformers import join_sentence_transformers
from .trainer import Trainer
from .trl import join_trl

events.subscribe(
    Distributed(),
    Peft(),
    GradientCheckpointing(),
    Offloading(),
    Trainer(),
    Packing(),
    RowAdapters(),
    ContinuousBatching(),
)

join_trainer()
join_sentence_transformers()
join_trl()
