"""Support for other libraries: the Trainer, PEFT, continuous batching and distributed training."""
