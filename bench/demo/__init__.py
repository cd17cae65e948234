"""The demo: train on a pretrained model and real text, and compare with the usual implementation of prefix tuning."""
